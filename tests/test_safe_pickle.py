"""Pickles are read as data: arrays come out whole, everything else is refused and nothing runs."""

import collections
import contextlib
import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from guided_diffusion.errors import UserError
from guided_diffusion.io.safe_pickle import load_arrays

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
NUMBERS = hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64))


def read(data: bytes):
    return load_arrays(io.BytesIO(data), "batch.bin")


def assert_same(got, wanted) -> None:
    assert type(got) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes()
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key in wanted:
            assert_same(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_same(a, b)
    else:
        assert repr(got) == repr(wanted)


# --- what must be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(array=hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
@settings(max_examples=40, deadline=None)
def test_arrays_survive_every_protocol(protocol, array):
    assert_same(read(pickle.dumps(array, protocol)), array)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.binary(), inner)
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(value=PLAIN)
@settings(max_examples=40, deadline=None)
def test_plain_data_survives_every_protocol(protocol, value):
    assert_same(read(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_layouts_byte_orders_scalars_and_sharing(protocol):
    base = np.arange(24, dtype=">i4").reshape(2, 3, 4)
    value = {
        "fortran": np.asfortranarray(base),
        "strided": base[:, ::2, 1:],
        "negative": base[::-1],
        "empty": np.zeros((0, 3), np.uint8),
        "scalar": np.float32(1.5),
        "shared": [base, base],
    }
    got = read(pickle.dumps(value, protocol))
    assert_same(got, value)
    assert got["shared"][0] is got["shared"][1]
    assert not got["fortran"].flags.writeable


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_defaultdict_comes_back_as_dict(protocol):
    pool = collections.defaultdict(None, total_t=np.arange(3))
    got = read(pickle.dumps(pool, protocol))
    assert type(got) is dict
    assert_same(got["total_t"], np.arange(3))


def test_bytearray_comes_back_as_bytes():
    assert_same(read(pickle.dumps(bytearray(b"abc"), 5)), b"abc")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_1_and_numpy_2_names(protocol):
    value = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "mean": np.float64(0.5)}
    ours = pickle.dumps(value, protocol)
    other = ours
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy.core." + module, b"numpy._core." + module
        if np.lib.NumpyVersion(np.__version__) < "2.0.0":
            old, new = new, old
        other = other.replace(b"c" + new + b"\n", b"c" + old + b"\n")  # protocols 0 to 3
        other = other.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)  # 4 and 5
    assert other != ours
    assert_same(read(ours), value)
    assert_same(read(other), value)


def test_the_original_pool():
    pytest.importorskip("numpy._core", reason="pickle alone reads the file with numpy 2 only, which wrote it")
    got = load_arrays(GOLDEN / "g5_dynamic_P1.cache")
    assert set(got) == {"total_t", "total_x_t_1"}
    assert got["total_t"].dtype == np.int64 and got["total_x_t_1"].dtype == np.float32
    with open(GOLDEN / "g5_dynamic_P1.cache", "rb") as file:
        wanted = pickle.load(file)  # our own file, committed with the tests
    for name in got:
        assert_same(got[name], np.asarray(wanted[name]))


def python_2_batch(pixels: bytes, rows: int, protocol: int) -> bytes:
    """A batch as Python 2 wrote it: strings of bytes, `numpy.core` names."""
    names = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
    reconstruct, ndarray, dtype = names
    if protocol == 0:

        def text(data: bytes) -> bytes:
            escaped = "".join(f"\\x{b:02x}" if b < 32 or b > 126 or b in b"\\'" else chr(b) for b in data)
            return b"S'" + escaped.encode() + b"'\np9\n"

        head = b"(dp1\n" + text(b"labels") + b"(lp2\n" + b"".join(b"I%d\na" % i for i in range(rows)) + b"s"
        array = reconstruct + b"p3\n(" + ndarray + b"(I0\nt" + text(b"b") + b"tRp4\n"
        state = b"(I1\n(I%d\nI%d\nt" % (rows, len(pixels) // rows)
        kind = dtype + b"(" + text(b"u1") + b"I0\nI1\ntR(I3\n" + text(b"|") + b"NNNI-1\nI-1\nI0\ntb"
        return head + text(b"data") + array + state + kind + b"I00\n" + text(pixels) + b"tbs."

    def binary(data: bytes) -> bytes:
        if len(data) < 256:
            return b"U" + bytes([len(data)]) + data
        return b"T" + len(data).to_bytes(4, "little") + data

    labels = b"](" + b"".join(b"K" + bytes([i]) for i in range(rows)) + b"e"
    array = reconstruct + ndarray + b"K\x00\x85" + binary(b"b") + b"\x87R"
    state = b"(K\x01K" + bytes([rows]) + b"M" + (len(pixels) // rows).to_bytes(2, "little") + b"\x86"
    kind = (
        dtype
        + binary(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + binary(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    batch = (
        binary(b"labels") + labels + binary(b"data") + array + state + kind + b"\x89" + binary(pixels) + b"tb"
    )
    return b"\x80\x02}(" + batch + b"u."


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_batches(protocol):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    pixels[0, :256] = np.arange(256)
    data = python_2_batch(pixels.tobytes(), 5, protocol)
    assert_same(pickle.loads(data, encoding="latin1")["data"], pixels)  # the sample is what it claims to be
    got = read(data)
    assert got["labels"] == [0, 1, 2, 3, 4]
    assert_same(got["data"], pixels)


# --- what must be refused --------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, open, getattr, __import__, subprocess.Popen, np.load, np.frombuffer]
)
def test_calls_are_refused_and_not_made(protocol, function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = {"data": np.arange(4), "labels": Calls(function, f"touch {tmp_path}/owned")}
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(UserError) as error:
        load_arrays(path)
    message = str(error.value)
    assert message.startswith(f"{path}: refused, nothing in it was run")
    assert function.__name__ in message and "\n" not in message
    assert os.listdir(tmp_path) == ["data_batch_1"]


def test_a_stream_is_named_as_asked():
    with pytest.raises(UserError, match=r"^batch\.bin: refused.*posix\.system"):
        read(b"cposix\nsystem\n(S'true'\ntR.")


HOSTILE = {
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "NEWOBJ of an allowed name": b"\x80\x02cnumpy\nndarray\n(K\x02t\x81.",
    "call of an allowed name": b"\x80\x02cnumpy\nndarray\nK\x02\x85R.",
    "call of plain data": b"\x80\x02X\x04\x00\x00\x00evil)R.",
    "a name left uncalled": b"\x80\x02cnumpy\nndarray\n.",
    "a name within a list": b"\x80\x02](K\x01cnumpy\nndarray\ne.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93.",
    "name that is a number": b"\x80\x04K\x01K\x02\x93.",
    "persistent id": b"Psecret\n.",
    "extension registry": b"\x80\x02\x82\x01.",
    "set": b"\x80\x04\x8f.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "defaultdict that calls": b"\x80\x02ccollections\ndefaultdict\ncnumpy\nndarray\n\x85R.",
    "codec that runs more": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
    "BUILD on a dict": b"\x80\x02}}X\x01\x00\x00\x00aK\x01sb.",
    "BUILD on a name": b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",
    "BUILD with slots": b"\x80\x02cnumpy\nndarray\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "array used as a key": b"\x80\x02}cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87RK\x01s.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tricks_are_refused(name):
    with pytest.raises(UserError, match=r"^batch\.bin: refused, nothing in it was run") as error:
        read(HOSTILE[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        np.array([{"a": 1}, None], dtype=object),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "u1"), ("b", "O")]),
        np.zeros(2, dtype="M8[s]"),
        np.ma.masked_array([1, 2], [False, True]),
        np.dtype("u1"),
        np.zeros(2, dtype=bool),
        np.arange(3).view(np.recarray),
        {1: "a number as a key"},
        {("a", "tuple"): "as a key"},
        {"set"},
        2j,
        Path("a"),
        int,
    ],
    ids=repr,
)
def test_other_values_are_refused(protocol, value):
    with pytest.raises(UserError, match=r"^batch\.bin: refused, nothing in it was run"):
        read(pickle.dumps({"data": value}, protocol))


def array_pickle(shape: tuple, code: str, order: str, data: object, reuse: bytes = b"") -> bytes:
    """An array's pickle, with any description of it."""

    def dump(value: object) -> bytes:
        return pickle.dumps(value, 3)[2:-1]  # without PROTO and STOP; memo numbers may repeat

    dtype = b"cnumpy\ndtype\n" + dump((code, False, True)) + b"R("
    dtype += b"K\x03" + dump(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    head = (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + dump((0,))
        + dump(b"b")
        + b"\x87R"
    )
    return head + b"(K\x01" + dump(shape) + dtype + b"\x89" + dump(data) + b"tb" + reuse + b"."


def test_the_hand_made_array_is_read_when_it_is_right():
    assert_same(
        read(array_pickle((2, 3), "u1", "|", b"abcdef")), np.frombuffer(b"abcdef", "u1").reshape(2, 3)
    )


@pytest.mark.parametrize(
    "shape, code, order, data",
    [
        ((2, 4), "u1", "|", b"abcdef"),
        ((5,), "u1", "|", b"abcdef"),
        ((3,), "i4", "<", b"abcdef"),
        ((1 << 50,), "u1", "|", b"abcdef"),
        ((1 << 32, 1 << 32, 6), "u1", "|", b"abcdef"),  # 6 modulo 2^64
        ((10**30,), "f8", "<", b""),
        ((0, 10**30), "f8", "<", b""),
        ((-1, -6), "u1", "|", b"abcdef"),
        ((-2, 3), "u1", "|", b"abcdef"),
        ((6.0,), "u1", "|", b"abcdef"),
        ((True, 6), "u1", "|", b"abcdef"),
        ((1,) * 9, "u1", "|", b"a"),
        ([6], "u1", "|", b"abcdef"),
        (6, "u1", "|", b"abcdef"),
        ((1,), "O", "|", b"abcdefgh"),
        ((1,), "O8", "|", b"abcdefgh"),
        ((1,), "V6", "|", b"abcdef"),
        ((1,), "u1,O", "|", b"abcdefghi"),
        ((6,), "u1\n", "|", b"abcdef"),
        ((6,), "u1", "&", b"abcdef"),
        ((2,), "u1", "|", [1, 2]),
        ((2,), "u1", "|", None),
    ],
)
def test_arrays_that_do_not_fit_their_bytes_are_refused(shape, code, order, data):
    with pytest.raises(UserError, match=r"^batch\.bin: refused") as error:
        read(array_pickle(shape, code, order, data))
    assert len(str(error.value)) < 300


def test_an_empty_array_too_large_for_numpy_is_told():
    with pytest.raises(UserError, match=r"^batch\.bin: "):
        read(array_pickle((0, 1 << 39, 1 << 39), "f8", "<", b""))


def test_an_array_cannot_be_rebuilt():
    again = b"(K\x01K\x06\x85" + b"NK\x00C\x06abcdeftb"
    with pytest.raises(UserError, match="refused"):
        read(array_pickle((6,), "u1", "|", b"abcdef", again))


def test_an_unfinished_array_is_refused():
    half = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R."
    with pytest.raises(UserError, match="refused"):
        read(half)
    with pytest.raises(UserError, match="refused"):
        read(half[:-1] + b"q\x01](h\x01e.")


# --- damage and size -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_told(protocol):
    batch = {
        "labels": list(range(300)),
        "data": np.arange(600, dtype=np.uint8).reshape(3, 200),
        "x": np.ones((2, 3), np.float32),
        "name": "é",
    }
    whole = pickle.dumps(batch, protocol)
    offsets = random.Random(protocol).sample(range(1, len(whole)), 300)
    for end in [0, *offsets, len(whole) - 1]:
        with pytest.raises(UserError, match=r"^batch\.bin: truncated, or not a pickle \(.+\)$"):
            read(whole[:end])


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_raises_nothing_but_a_user_error(data):
    with contextlib.suppress(UserError):
        read(data)


@given(st.integers(0, 5), st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_raise_nothing_but_a_user_error(protocol, data):
    whole = bytearray(
        pickle.dumps({"data": np.arange(8), "t": [1, (2, "a", b"b")], "s": np.int8(1)}, protocol)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        read(bytes(whole))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_arrays(tmp_path / "nothing")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_arrays(tmp_path)


LENGTHS = {
    "BINBYTES8": b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little"),
    "BYTEARRAY8": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little"),
    "BINUNICODE8": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little"),
    "BINBYTES": b"\x80\x03B\xff\xff\xff\xff",
    "BINSTRING": b"\x80\x02T\xff\xff\xff\x7f",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f",
    "FRAME": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little"),
    "digits": b"I" + b"9" * 100_000 + b"\n.",
}

# Reads each file of a folder in a process that may take 256 MiB more than what it has once imported.
BOUNDED = """
import resource, sys
from pathlib import Path
from guided_diffusion.errors import UserError
from guided_diffusion.io.safe_pickle import load_arrays
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        load_arrays(path)
        print("read")
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("name", LENGTHS)
def test_absurd_lengths_are_refused(name):
    with pytest.raises(UserError, match=r"^batch\.bin: truncated"):
        read(LENGTHS[name])


def copies(count: int) -> bytes:
    """A pickle that makes `count` copies of one megabyte."""
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
    return b"\x80\x02](" + text + encode + b"h\x01h\x00h\x02\x86R" * count + b"e."


SMALL_BUT_HEAVY = {
    **{name: (data, "truncated") for name, data in LENGTHS.items()},
    "memo number of two billion": (b"\x80\x02Nr\xff\xff\xff\x7f.", "read"),
    "a thousand copies of a long string": (copies(1000), "unfolds into more than the file holds"),
    "memo numbers that collide": (
        b"\x80\x02N" + b"".join(b"p%d\n" % (n * ((1 << 61) - 1)) for n in range(1, 60_000)) + b".",
        "numbers its values absurdly",
    ),
    "deeply nested tuple as a key": (b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.", "key is a tuple"),
    "key whose hash takes forever": (b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"Ns.", "key is a tuple"),
    "deeply nested list": (b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b".", "read"),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through /proc and setrlimit")
def test_small_files_neither_fill_the_memory_nor_crash_the_process(tmp_path):
    for i, (data, _) in enumerate(SMALL_BUT_HEAVY.values()):
        (tmp_path / f"{i:02}").write_bytes(data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOUNDED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for (name, (_, wanted)), line in zip(SMALL_BUT_HEAVY.items(), told, strict=True):
        assert wanted in line, name
