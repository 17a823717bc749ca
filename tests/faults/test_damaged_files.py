"""Every kind of file, damaged in every way: read right, or refused in one line; and never believed."""

import io
import json
import pickle
import resource
import shutil
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch as th
from driver import FORK, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format
from tiny import T, distillation

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.settings import Experiment
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.pool_file import read_pool, write_pool
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.logger import RunLog, read_progress
from guided_diffusion.runs.checkpoint import newest_checkpoint, open_checkpoint, save_checkpoint
from guided_diffusion.runs.weights import load_state_dict

SIZE = 8
RANDOM = np.random.default_rng(0)


def pool():
    x = th.from_numpy(RANDOM.standard_normal((6, 3, SIZE, SIZE), dtype=np.float32))
    return DynamicBatch(x, th.arange(1, 7), T)


def read_our_pool(path):
    found = read_pool(path, T, (3, SIZE, SIZE))
    return {"x": found.x, "levels": found.levels}


def read_npz(path):
    archive = NpzFile(path)
    arrays = {name: th.from_numpy(archive.load(name)) for name in sorted(archive.headers)}
    rows = [th.from_numpy(block) for block in archive.stream("arr_0", 3)]
    assert th.equal(th.cat(rows), arrays["arr_0"])
    return arrays


def read_dataset(path):
    dataset = open_dataset(path, SIZE, class_cond=True)
    images, labels = dataset.batch(np.arange(len(dataset)))
    return {"shape": images.shape, "labels": labels.shape}


def read_config(path):
    assert isinstance(load_experiment(path), Experiment)


def make_checkpoint(folder):
    for step in (10, 20):
        weights = {"model": {"w": th.arange(40.0) + step}, "opt": {"lr": 1e-3, "state": {0: th.ones(3)}}}
        save_checkpoint(folder, step, weights | {"pool": lambda path: write_pool(path, [pool()], {})})


def read_checkpoint(path):
    """What a run in this folder would resume from; None where it would start anew."""
    found = newest_checkpoint(path.parent)
    if found is None:
        return None
    assert th.equal(load_state_dict(found.path("model"))["w"], th.arange(40.0) + found.step)
    assert read_torch_file(found.path("opt"))["lr"] == 1e-3
    read_our_pool(found.path("pool"))
    return found.step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One whole file of every kind."""
    path = tmp_path_factory.mktemp("whole")
    teacher = {
        "in.weight": th.randn(8, 3),
        "half": th.randn(5).half(),
        "count": th.arange(4),
        "t": th.ones(2, 3).t(),
    }
    th.save(teacher, path / "teacher.pt")
    optimizer = {
        "optimizer": {"state": {0: {"step": th.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    }
    th.save(optimizer, path / "opt.pt")
    write_pool(path / "pool.cache", [pool()], {"T": T})
    original = {"total_t": np.arange(1, 7), "total_x_t_1": pool().x.numpy()}
    (path / "original.cache").write_bytes(pickle.dumps(original))
    distillation(path, image_size=8)
    images = RANDOM.integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(path / "images.npz", images, np.arange(9) % 3)
    np.savez_compressed(path / "packed.npz", images // 64, np.arange(9) % 3)
    (path / "run").mkdir()
    make_checkpoint(path / "run")
    return path


# file, reader, and whether checksums let nothing but the very contents through
KINDS = {
    "teacher.pt": (load_state_dict, True),
    "opt.pt": (read_torch_file, True),
    "pool.cache": (read_our_pool, True),
    "original.cache": (read_our_pool, False),
    "tiny.yaml": (read_config, False),
    "images.npz": (read_npz, True),
    "packed.npz": (read_npz, True),
    "images.npz as a data set": (read_dataset, False),
    "run/model000020.pt": (read_checkpoint, False),
    "run/teacher-state-000020.cache": (read_checkpoint, False),
    "run/opt000020.pt": (read_checkpoint, False),
    "run/checkpoint000020.json": (read_checkpoint, False),
}


@st.composite
def mutations(draw):
    """A function of bytes: cut, flip, zero, repeat, or put something else."""
    kind = draw(st.sampled_from(["cut", "flip", "flips", "zero", "repeat", "drop", "insert", "set"]))
    where = (
        draw(st.floats(0, 1)) if draw(st.booleans()) else draw(st.sampled_from([0.0, 0.001, 0.01, 0.99, 1.0]))
    )
    length = draw(st.integers(1, 200))
    byte = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, *b"[{&*!$:,.-0"]))
    bit = draw(st.integers(0, 7))

    def mutate(data):
        at = min(int(where * len(data)), len(data) - 1)
        end = min(at + length, len(data))
        changed = bytearray(data)
        if kind == "cut":
            return bytes(changed[:at])
        if kind == "flip":
            changed[at] ^= 1 << bit
        elif kind == "flips":
            for i in range(at, end, 7):
                changed[i] ^= 1 << bit
        elif kind == "zero":
            changed[at:end] = bytes(end - at)
        elif kind == "repeat":
            changed[at:at] = changed[at:end]
        elif kind == "drop":
            del changed[at:end]
        elif kind == "insert":
            changed[at:at] = bytes([byte]) * length
        elif kind == "set":
            changed[at] = byte
        return bytes(changed)

    return mutate


def outcome(reader, path):
    """What a reader gives, or the UserError it refuses in; any other exception fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return reader(path)
        except UserError as error:
            told = error
    assert str(told) and "\n" not in str(told)
    assert path.name in str(told) or reader is read_config  # there the key is named
    return told


def check(kind, folder, scratch, mutate):
    reader, exact = KINDS[kind]
    name = kind.partition(" ")[0]
    target = scratch / name
    if name.startswith("run/"):
        shutil.copytree(folder / "run", scratch / "run", dirs_exist_ok=True)
    elif name.endswith(".yaml"):
        shutil.copy(folder / "teacher.pt", scratch)
    whole = (folder / name).read_bytes()
    target.write_bytes(mutate(whole))
    got = outcome(reader, target)
    if isinstance(got, UserError):
        assert reader is not read_checkpoint
    elif reader is read_checkpoint:
        assert got == 20 if target.read_bytes() == whole else got in (10, 20)
    elif exact:
        wanted = reader(folder / name)
        if reader is read_npz:  # a damaged directory may hide an array: whoever needs it is then told
            wanted = {key: wanted[key] for key in got}
        assert_same(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@given(mutate=mutations())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_damage_is_told_in_one_line(kind, folder, tmp_path_factory, mutate):
    check(kind, folder, tmp_path_factory.getbasetemp(), mutate)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(mutate=mutations())
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_damage_is_told_in_one_line_at_length(kind, folder, tmp_path_factory, mutate):
    check(kind, folder, tmp_path_factory.getbasetemp(), mutate)


# --- files that were made to harm ------------------------------------------------------------------


def growth(function, *args):
    """MiB by which the largest memory of a process grows while it reads a file, and what it says."""
    answers = FORK.SimpleQueue()

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            told = f"read: {function(*args)!r:.60}"
        except UserError as error:
            told = f"UserError: {error}"
        except BaseException as error:
            told = repr(error)
        answers.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, told))

    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    kib, told = answers.get()
    return kib / 1024, told


def npz(path, shape, content, compression=zipfile.ZIP_DEFLATED, descr="|u1"):
    header = io.BytesIO()
    npy_format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive, archive.open("arr_0.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(content >> 20):
            member.write(bytes(1 << 20))


def torch_zip(path, pickled, compression=zipfile.ZIP_STORED, record=bytes(16)):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", record)


def tensor_pickle(count, size, stride, offset=0):
    """What torch.save writes for {"w": tensor}, with sizes of our choice."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)  # LONG1

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
    )
    return b"\x80\x02}X\x01\0\0\0w" + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


def test_the_crafted_tensor_is_one(tmp_path):
    """What follows is refused for its sizes, not because it is malformed."""
    torch_zip(tmp_path / "fine.pt", tensor_pickle(4, (2, 2), (2, 1)))
    assert th.equal(load_state_dict(tmp_path / "fine.pt")["w"], th.zeros(2, 2))


TENSORS = {
    "storage larger than its bytes": (1 << 40, (1,), (1,)),
    "storage of negative size": (-4, (1,), (1,)),
    "beyond the end": (4, (5,), (1,)),
    "beyond the end by its stride": (4, (2, 2), (4, 1)),
    "one number seen a million times": (4, (1 << 20,), (0,)),
    "absurd shape": (4, (1 << 30, 1 << 30), (0, 0)),
    "negative shape": (4, (-2, -2), (1, 1)),
    "negative offset": (4, (1,), (1,), -1),
}


@pytest.mark.parametrize("case", TENSORS)
def test_absurd_tensors_are_refused(tmp_path, case):
    torch_zip(tmp_path / "file.pt", tensor_pickle(*TENSORS[case]))
    grown, told = growth(load_state_dict, tmp_path / "file.pt")
    assert told.startswith("UserError") and "file.pt" in told
    assert grown < 30


def bomb_npz(path):
    npz(path, ((256 << 20),), 256 << 20)


def absurd_npz(path):
    npz(path, (1 << 44,), 1 << 20)


def nested_npz(path):
    with zipfile.ZipFile(path, "w") as archive:
        header = ("(" * 3000).encode() + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def object_npz(path):
    np.savez(path, np.array([print], dtype=object))


def bomb_torch(path):
    torch_zip(path, tensor_pickle(64 << 20, (64 << 20,), (1,)), zipfile.ZIP_DEFLATED, bytes(256 << 20))


def bomb_torch_pickle(path):
    torch_zip(path, bytes(256 << 20), zipfile.ZIP_DEFLATED)


def overlapping_torch(path):
    """Many entries that are the same bytes of the file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(4, (2, 2), (2, 1)))
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist.extend([archive.filelist[1]] * 300)


def absurd_safetensors(path):
    header = {"total_t": {"dtype": "I64", "shape": [1 << 60], "data_offsets": [0, 8]}}
    header |= {"total_x_t_1": {"dtype": "F32", "shape": [1 << 30, 3, 8, 8], "data_offsets": [8, 16]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def endless_safetensors(path):
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def laughing_yaml(path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    path.write_text("\n".join(lines))


def circular_yaml(path):
    path.write_text("a: &a [*a]")


def deep_yaml(path):
    path.write_text("[" * 5000)


def python_yaml(path):
    path.write_text("lr: !!python/object/apply:os.system ['true']")


HARM = {
    "an npz bomb": (bomb_npz, read_npz),
    "an npz of absurd shape": (absurd_npz, read_npz),
    "an npz of nested header": (nested_npz, read_npz),
    "an npz of objects": (object_npz, read_npz),
    "a checkpoint bomb": (bomb_torch, load_state_dict),
    "a checkpoint with a pickle bomb": (bomb_torch_pickle, load_state_dict),
    "a checkpoint of overlapping entries": (overlapping_torch, load_state_dict),
    "a pool of absurd shape": (absurd_safetensors, read_our_pool),
    "a pool of endless header": (endless_safetensors, read_our_pool),
    "YAML that unfolds": (laughing_yaml, read_config),
    "YAML that contains itself": (circular_yaml, read_config),
    "YAML nested deeply": (deep_yaml, read_config),
    "YAML that calls": (python_yaml, read_config),
}


@pytest.mark.parametrize("case", HARM)
def test_harm_is_refused_before_it_is_allocated(tmp_path, case):
    make, reader = HARM[case]
    path = tmp_path / "file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of the duplicates being written
        make(path)
    path = path if path.exists() else path.with_suffix(".npz")
    assert path.stat().st_size < 2 << 20
    grown, told = growth(reader, path)
    assert told.startswith("UserError") and path.name in told and "\n" not in told, told
    assert grown < 40, told


def test_a_pool_that_was_read_no_longer_needs_its_file(tmp_path):
    path = tmp_path / "pool.cache"
    write_pool(path, [pool()], {"T": T})
    found = read_pool(path, T, (3, SIZE, SIZE))
    before = found.x.clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert th.equal(found.x, before)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    """Superfluous checkpoints' files are removed by the names in their manifest."""
    run = tmp_path / "run"
    run.mkdir()
    make_checkpoint(run)
    (tmp_path / "precious.pt").write_bytes(b"")
    manifest = json.loads((run / "checkpoint000020.json").read_text())
    for name in ("../precious.pt", "/etc/passwd", "..", "model000010.pt", "checkpoint000010.json"):
        manifest["files"][name] = {"bytes": 0, "sha256": ""}
        (run / "checkpoint000020.json").write_text(json.dumps(manifest))
        assert newest_checkpoint(run).step == 10
        del manifest["files"][name]
    (run / "checkpoint000020.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(run).step == 20
    for text in (
        '{"files": {}}',
        '{"files": []}',
        "[]",
        "null",
        '{"files": {"model000020.pt": 3}}',
        "[" * 10**5,
    ):
        (run / "checkpoint000020.json").write_text(text)
        assert newest_checkpoint(run).step == 10
        with pytest.raises(UserError, match=r"checkpoint000020\.json"):
            open_checkpoint(run / "model000020.pt")


@pytest.mark.parametrize("tail", ["4,0.5", "4", "4,0.5,0.1", "4,\0\0\0\n", "x,y,z\n", "\xff\n"])
def test_a_torn_row_of_the_log_is_dropped(tmp_path, tail):
    path = tmp_path / "progress.csv"
    path.write_bytes(b"step,loss,lr\n2,1.0,0.1\n3,1.0,0.1\n" + tail.encode("latin-1"))
    assert [row["step"] for row in read_progress(path)][:2] == [2, 3]
    log = RunLog(tmp_path)
    log.drop_rows_after(2)
    log.row(3, {"loss": 0.5, "lr": 0.1})
    assert [(row["step"], row["loss"]) for row in read_progress(path)] == [(2, 1.0), (3, 0.5)]
    with open(path, "a") as file:
        file.write("4,0.")
    log.row(4, {"loss": 0.25, "lr": 0.1})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_progress(path)] == [(2, 1.0), (3, 0.5), (4, 0.25)]
