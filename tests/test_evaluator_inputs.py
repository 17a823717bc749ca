"""What the evaluator is given: files that are wrong, weight files that are fetched, the torch backend."""

import functools
import hashlib
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from golden_data import GOLDEN, unpack_golden_graph
from inception_graphs import (
    import_torch_fidelity,
    inception_shapes,
    random_inception_state,
    write_graph,
)

from evaluations import inception_tensorflow, inception_torch, weight_files
from evaluations.evaluator import evaluate
from evaluations.reference import _stored_statistics
from evaluations.results import values
from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.npz_reader import NpzFile

EVALUATOR = Path(__file__).parents[1] / "evaluations" / "evaluator.py"


def run(*arguments):
    command = [sys.executable, EVALUATOR, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def files(tmp_path):
    """ref.npz and good.npz, 100 real digits each: what is tested here goes wrong before any score."""
    images, _ = load_digit_images()
    np.savez(tmp_path / "ref.npz", images[:100])
    np.savez(tmp_path / "good.npz", images[100:200])
    return tmp_path


# Files


def truncated(path):
    np.savez(path, load_digit_images()[0][:100])
    path.write_bytes(path.read_bytes()[:-300])


def corrupted(path):
    np.savez_compressed(path, load_digit_images()[0][:100])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def objects(path):
    np.savez(path, np.array([{}], dtype=object))


def saved(array, name="arr_0"):
    return lambda path: np.savez(path, **{name: array})


def zeros(*shape, dtype=np.uint8):
    return saved(np.zeros(shape, dtype))


BAD = {
    "missing": (lambda path: None, "no such file"),
    "no archive": (lambda path: path.write_bytes(b"pictures"), "not a readable npz"),
    "truncated": (truncated, "not a readable npz"),
    "corrupted": (corrupted, "damaged archive"),
    "objects": (objects, "no plain array"),
    "other name": (saved(np.zeros(3), "images"), r"no array 'arr_0' \(it holds: images\)"),
    "float": (saved(np.linspace(-1, 1, 768 * 20).reshape(20, 16, 16, 3)), "float64 with values from -1 to"),
    "NaN": (saved(np.full((20, 16, 16, 3), np.nan, np.float32)), "float32 and holds NaN or infinity"),
    "wide integers": (
        zeros(20, 16, 16, 3, dtype=np.int64),
        "int64 with values from 0 to 0, images are uint8",
    ),
    "channels first": (zeros(20, 3, 16, 16), "looks like NCHW"),
    "gray": (zeros(20, 16, 16), r"shape \[20, 16, 16\], images are \[N, height, width, 3\]"),
    "four channels": (zeros(20, 16, 16, 4), r"shape \[20, 16, 16, 4\]"),
    "no pixels": (zeros(20, 0, 16, 3), "no pixels"),
    "empty": (zeros(0, 16, 16, 3), "holds 0 images, at least 6"),
    "too few": (zeros(5, 16, 16, 3), "holds 5 images, at least 6"),
    "too large": (zeros(20, 24, 24, 3), "images of 24x24, 16x16 or 32x32 are wanted"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.filterwarnings("ignore:.*images are fewer than:UserWarning")
def test_bad_samples_are_told_in_one_line(files, what):
    make, message = BAD[what]
    make(files / "bad.npz")
    with pytest.raises(UserError, match=message) as error:
        evaluate(files / "ref.npz", files / "bad.npz", backend="digits")
    assert "bad.npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["missing", "truncated", "float", "too few"])
def test_bad_references_are_told_in_one_line(files, what):
    make, message = BAD[what]
    make(files / "bad.npz")
    with pytest.raises(UserError, match=message):
        evaluate(files / "bad.npz", files / "good.npz", backend="digits")


def test_intervals_need_twice_as_many_images(files):
    np.savez(files / "ten.npz", load_digit_images()[0][:10])
    with pytest.raises(UserError, match="holds 10 images, at least 12"):
        evaluate(files / "ref.npz", files / "ten.npz", backend="digits", intervals=5)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"backend": "jax"}, "no backend 'jax'; there are: tensorflow, torch, digits"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"intervals": 1}, "at least 2 half-samples"),
        ({"intervals": -3}, "at least 2 half-samples"),
        ({"seed": -1}, "seed must not be negative"),
        ({"weights": "nowhere.pb"}, "no such weight file: nowhere.pb"),
        ({"backend": "digits", "kid": True}, "kid is for the Inception backends"),
        ({"backend": "digits", "density_coverage": True}, "density_coverage is for the Inception"),
        ({"backend": "digits", "device": "cuda"}, "device is for the Inception backends"),
    ],
)
def test_arguments_that_make_no_sense(files, keywords, message):
    with pytest.raises(UserError, match=message):
        evaluate(files / "ref.npz", files / "good.npz", **keywords)


# The command


def test_command_exits_with_one_line_and_no_traceback(files):
    done = run(files / "ref.npz", files / "nowhere.npz", "--backend", "digits")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: no such file: {files / 'nowhere.npz'}\n"


def test_command_reports_what_came_before_a_damaged_file(files):
    corrupted(files / "bad.npz")
    done = run(
        files / "ref.npz", files / "good.npz", files / "bad.npz", "--backend", "digits",
        "--output", files / "record.json",
    )  # fmt: skip
    assert done.returncode == 1
    assert "damaged archive" in done.stderr.splitlines()[-1]
    assert done.stdout.startswith("digits-FD: ")
    assert '"good.npz"' in (files / "record.json").read_text().replace(f"{files}/", "")


def test_command_refuses_an_output_that_is_a_folder(files):
    done = run(files / "ref.npz", files / "good.npz", "--backend", "digits", "--output", files)
    assert done.returncode == 1
    assert "is a folder" in done.stderr


def test_command_tells_before_it_scores_that_its_output_cannot_be_written(files):
    done = run(files / "ref.npz", files / "good.npz", "--backend", "digits", "--output", files / "ref.npz/x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {files / 'ref.npz'} is a file, and a folder is wanted\n"
    os.mkfifo(files / "queue")
    done = run(files / "ref.npz", files / "good.npz", "--backend", "digits", "--output", files / "queue")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: --output {files / 'queue'} is no file, a file to write is wanted\n"


def test_stored_statistics_that_are_none_are_told_when_they_are_read(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2048), sigma=-np.eye(2048, dtype=np.float32))
    told = r"bad\.npz: sigma: a stored covariance matrix is not positive semi-definite"
    with pytest.raises(UserError, match=told):
        _stored_statistics(NpzFile(tmp_path / "bad.npz"))


def test_help_has_a_line_for_every_option_and_imports_no_network_library():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['evaluator.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(EVALUATOR)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    print({'torch', 'tensorflow', 'scipy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    for option in ("--backend", "--inception", "--batch_size", "--kid", "--density_coverage", "--intervals",
                   "--seed", "--device", "--no_cache", "--output"):  # fmt: skip
        assert f"  {option}" in done.stdout


# Weight files


@pytest.fixture
def server(tmp_path):
    """A web server over tmp_path/web; yields its folder, its address and the list of requests."""
    folder, requests = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

        def send_header(self, keyword, value):
            if keyword == "Content-Length" and self.path.startswith("/short"):
                value = "1000000"  # more than follows
            super().send_header(keyword, value)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{web.server_port}", requests
        web.shutdown()
        thread.join()


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return weight_files.cache_directory()


def test_the_graph_is_downloaded_once(server, user_cache, monkeypatch):
    folder, address, requests = server
    unpack_golden_graph(folder / "classify_image_graph_def.pb")
    monkeypatch.setattr(inception_tensorflow, "URL", f"{address}/classify_image_graph_def.pb")
    for _ in range(2):
        found = inception_tensorflow.find_graph(None)
    assert found == user_cache / "classify_image_graph_def.pb"
    assert found.read_bytes() == (folder / found.name).read_bytes()
    assert requests == ["/classify_image_graph_def.pb"]
    assert inception_tensorflow.find_graph(folder) == folder  # one that is named is not looked for


def test_a_download_that_is_no_graph_is_not_kept(server, user_cache, monkeypatch):
    folder, address, _ = server
    (folder / "graph.pb").write_text("<html>please log in</html>")
    monkeypatch.setattr(inception_tensorflow, "URL", f"{address}/graph.pb")
    with pytest.raises(UserError, match=r"not a TensorFlow graph|without the nodes"):
        inception_tensorflow.find_graph(None)
    assert list(user_cache.iterdir()) == []


@pytest.mark.parametrize("name", ["short.bin", "absent.bin"])
def test_a_download_that_breaks_off_is_not_kept(server, user_cache, name):
    folder, address, _ = server
    (folder / "short.bin").write_bytes(bytes(1000))
    with pytest.raises(UserError, match="cannot download") as error:
        weight_files.download_once(f"{address}/{name}", lambda path: None)
    assert str(user_cache / name) in str(error.value)
    assert list(user_cache.iterdir()) == []


def test_offline_the_message_says_where_to_put_the_graph(files, user_cache, monkeypatch):
    monkeypatch.setattr(inception_tensorflow, "URL", "http://127.0.0.1:1/classify_image_graph_def.pb")
    with (
        pytest.warns(UserWarning, match="fewer than"),
        pytest.raises(UserError, match=r"cannot download .* --inception PATH") as error,
    ):
        evaluate(files / "ref.npz", files / "good.npz")
    assert str(user_cache / "classify_image_graph_def.pb") in str(error.value)


def test_the_hash_in_a_weight_files_name_is_verified(tmp_path):
    data = b"weights"
    digest = hashlib.sha256(data).hexdigest()
    good, bad = tmp_path / f"weights-{digest[:8]}.pth", tmp_path / "weights-0badc0de.pth"
    plain = tmp_path / "weights.pth"
    for path in (good, bad, plain):
        path.write_bytes(data)
    assert inception_torch.find_weights(good) == good
    assert inception_torch.find_weights(plain) == plain
    with pytest.raises(UserError, match=f"begins with {digest[:8]}, not 0badc0de"):
        inception_torch.find_weights(bad)


# The torch backend


@pytest.fixture(scope="module")
def torch_fidelity_network():
    return import_torch_fidelity()


@pytest.fixture(scope="module")
def same_weights(tmp_path_factory):
    """One set of random weights as a torch file and as a TensorFlow graph."""
    folder = tmp_path_factory.mktemp("weights")
    state = random_inception_state(inception_shapes(folder))
    th.save(state, folder / "inception.pth")
    return folder / "inception.pth", write_graph(state, folder / "inception.pb")


def test_weights_in_the_format_before_torch_1_6_are_read(same_weights, tmp_path):
    new, old = same_weights[0], tmp_path / "old.pth"
    th.save(th.load(new), old, _use_new_zipfile_serialization=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    pools = [inception_torch.TorchExtractor(path).extract(images)[0] for path in (new, old)]
    np.testing.assert_array_equal(*pools)


def test_both_backends_agree_on_the_same_weights(same_weights, tmp_path):
    for side, rows in (("ref", slice(0, 6)), ("sample", slice(0, 7))):
        np.savez(tmp_path / f"{side}.npz", NpzFile(GOLDEN / f"g6_images_{side}.npz").load("arr_0")[rows])
    weights, graph = same_weights
    ours = inception_torch.TorchExtractor(weights)
    theirs = inception_tensorflow.TensorflowExtractor(graph)
    images = NpzFile(tmp_path / "sample.npz").load("arr_0")
    for a, b in zip(ours.extract(images), theirs.extract(images), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    features, _ = theirs.extract(images)
    np.testing.assert_allclose(ours.probabilities(features), theirs.probabilities(features), rtol=1e-5)
    with pytest.warns(UserWarning, match="fewer than"):
        by_torch = evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz", backend="torch", weights=weights)
    with pytest.warns(UserWarning, match="fewer than"):
        by_graph = evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz", weights=graph)
    assert values(by_torch) == pytest.approx(values(by_graph), rel=1e-4)
    assert (by_torch.backend, by_graph.backend) == ("torch", "tensorflow")
    # Each backend keeps its own statistics of the reference.
    assert len(list(tmp_path.glob("ref.*.ref-stats.npz"))) == 2


def test_the_published_torch_weights_are_downloaded_and_verified(
    torch_fidelity_network, server, user_cache, monkeypatch
):
    folder, address, requests = server
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    good = f"inception-{digest}.pth"
    for name in (good, "inception-0badc0de.pth"):
        (folder / name).write_bytes(b"weights")
    monkeypatch.setattr(torch_fidelity_network, "URL_INCEPTION_V3", f"{address}/inception-0badc0de.pth")
    with pytest.raises(UserError, match="not 0badc0de"):
        inception_torch.find_weights(None)
    monkeypatch.setattr(torch_fidelity_network, "URL_INCEPTION_V3", f"{address}/{good}")
    assert inception_torch.find_weights(None) == user_cache / good
    assert [path.name for path in user_cache.iterdir()] == [good]
    (user_cache / good).write_bytes(b"damaged since")
    with pytest.raises(UserError, match=f"not {digest}"):
        inception_torch.find_weights(None)
    assert requests == ["/inception-0badc0de.pth", f"/{good}"]


class Intruder:
    def __reduce__(self):
        return (Path.touch, (Path("intruder-was-here"),))


@pytest.mark.parametrize("what", ["text", "pickle", "zipped pickle", "other weights", "no mapping", "empty"])
def test_files_that_are_no_torch_weights(torch_fidelity_network, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    if what == "text":
        path.write_text("not weights")
    elif what == "pickle":
        path.write_bytes(pickle.dumps(Intruder(), protocol=2))
    elif what == "zipped pickle":
        th.save({"fc.weight": Intruder()}, path)
    elif what == "no mapping":
        th.save([1], path)
    elif what == "other weights":
        th.save(th.nn.Linear(2, 2).state_dict(), path)
    else:
        with zipfile.ZipFile(path, "w"):
            pass
    told = r"bad.pth: (not the weights of torch-fidelity's Inception|refused, nothing in it was run)"
    with pytest.raises(UserError, match=told):
        inception_torch.TorchExtractor(path)
    assert not (tmp_path / "intruder-was-here").exists()  # and no code was run


def test_a_device_that_is_not_there(torch_fidelity_network, tmp_path):
    shutil.copy(GOLDEN / "g6_evaluator.json", tmp_path / "w.pth")
    with pytest.raises(UserError, match="device 'warp' cannot be used"):
        inception_torch.TorchExtractor(tmp_path / "w.pth", "warp")


def test_without_torch_fidelity_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity torchvision"):
        inception_torch.find_weights(None)


def test_without_tensorflow_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuse("tensorflow"), *sys.meta_path])
    (tmp_path / "graph.pb").write_bytes(b"")
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        inception_tensorflow.TensorflowExtractor(tmp_path / "graph.pb")


class Refuse:
    """An import finder for which one package is not installed."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
