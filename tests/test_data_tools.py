"""The data tools: mixed training sets, CIFAR-10 as images, and the references of the evaluation."""

import hashlib
import importlib.util
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tracemalloc
import types
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from evaluations import celeba64_npz, cifar_npz, imagenet32_npz
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import open_dataset, read_image
from guided_diffusion.io import official_batches
from guided_diffusion.io.image_folder import write_image_folder
from guided_diffusion.io.official_batches import CIFAR10_CLASSES, cifar10_images, imagenet32_images

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    "datasets/mix.py",
    "datasets/download_cifar10.py",
    "evaluations/cifar_npz.py",
    "evaluations/celeba64_npz.py",
    "evaluations/imagenet32_npz.py",
]


def run(script: str, *arguments, cwd=None, python_options=()) -> subprocess.CompletedProcess:
    """A script as a user runs it."""
    command = [sys.executable, *python_options, ROOT / script, *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def loaded(script: str) -> types.ModuleType:
    """A script of `datasets/` as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


mix, download = loaded("datasets/mix.py"), loaded("datasets/download_cifar10.py")


def call(monkeypatch, module, *arguments) -> None:
    """A script's `main` with a command line."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def arrays(path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def noise(seed: int, count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# --- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_loading_anything_heavy(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path, python_options=["-X", "importtime"])
    assert done.returncode == 0
    assert "--out" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "torchvision", "PIL", "PIL.Image", "tensorflow", "scipy"}


def test_imports_run_one_way():
    imports = re.compile(r"^\s*(?:from|import) (guided_diffusion|evaluations|datasets)\b", re.M)
    for folder in ("guided_diffusion", "evaluations", "datasets"):
        for path in (ROOT / folder).rglob("*.py"):
            assert set(imports.findall(path.read_text())) <= {"guided_diffusion", folder}, path


# --- mix.py ----------------------------------------------------------------------------------------


def tagged(origin: int, count: int, size: int = 4) -> np.ndarray:
    """Images whose pixels tell where they come from and their number."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[..., 0] = origin
    images[..., 1], images[..., 2] = (part[:, None, None] for part in np.divmod(np.arange(count), 256))
    return images


def numbers(images: np.ndarray, origin: int) -> list[int]:
    mine = images[images[:, 0, 0, 0] == origin].astype(int)
    return (mine[:, 0, 0, 1] * 256 + mine[:, 0, 0, 2]).tolist()


REAL, SYNTHETIC = 10, 20  # origins


@pytest.fixture
def sources(tmp_path):
    """2,400 real images with labels n % 12, 3,000 synthetic ones with n % 5."""
    np.savez(tmp_path / "R.npz", tagged(REAL, 2400), np.arange(2400) % 12)
    np.savez_compressed(tmp_path / "S.npz", tagged(SYNTHETIC, 3000), (np.arange(3000) % 5).astype(np.int32))
    return tmp_path


def mixed(monkeypatch, folder, out="M.npz", ratio=0.05, seed=0, real="R.npz", synthetic="S.npz"):
    """Run mix.py in this process; the arrays it wrote, if it wrote an npz."""
    arguments = ["--real", folder / real, "--ratio", ratio, "--seed", seed, "--out", folder / out]
    if synthetic:
        arguments += ["--synthetic", folder / synthetic]
    call(monkeypatch, mix, *arguments)
    return arrays(folder / out) if out.endswith(".npz") else None


@pytest.mark.parametrize(
    "ratio, real_count",
    [(0, 0), (0.05, 120), (0.2, 480), (0.5, 1200), (0.0003, 1), (0.9999, 2400), (1, 2400)],
)
def test_a_mixed_set_has_the_size_of_the_real_one(monkeypatch, sources, ratio, real_count):
    content = mixed(monkeypatch, sources, ratio=ratio)
    images, labels = content["arr_0"], content["arr_1"]
    assert images.shape == (2400, 4, 4, 3) and images.dtype == np.uint8
    assert labels.shape == (2400,) and labels.dtype == np.int64
    real, synthetic = numbers(images, REAL), numbers(images, SYNTHETIC)
    assert len(real) == real_count and len(synthetic) == 2400 - real_count
    # Real ones first; each part ascending, so nothing comes twice; whole images; the right labels.
    assert (images[:real_count, 0, 0, 0] == REAL).all()
    assert all(np.diff(real) > 0) and all(np.diff(synthetic) > 0)
    np.testing.assert_array_equal(images[:real_count], tagged(REAL, 2400)[real])
    np.testing.assert_array_equal(images[real_count:], tagged(SYNTHETIC, 3000)[synthetic])
    assert labels.tolist() == [n % 12 for n in real] + [n % 5 for n in synthetic]


def test_the_choice_is_random_nested_and_repeatable(monkeypatch, sources):
    def chosen(**options):
        images = mixed(monkeypatch, sources, **options)["arr_0"]
        return set(numbers(images, REAL)), set(numbers(images, SYNTHETIC))

    real, synthetic = chosen(ratio=0.05)
    # Neither the first nor evenly spread: the mean of 120 of 0..2399 lies within 4 of its deviations.
    assert abs(np.mean(list(real)) - 1199.5) < 4 * 693 / 120**0.5
    assert max(synthetic) > 2400
    larger, fewer = chosen(ratio=0.1)
    assert real < larger and fewer < synthetic
    assert chosen(ratio=0.05, seed=1)[0] != real
    assert chosen(ratio=0.05) == (real, synthetic)


def test_the_same_bytes_whatever_the_compression(monkeypatch, sources):
    np.savez_compressed(sources / "R2.npz", **arrays(sources / "R.npz"))
    np.savez(sources / "S2.npz", **arrays(sources / "S.npz"))
    mixed(monkeypatch, sources, out="a.npz")
    mixed(monkeypatch, sources, out="b.npz")
    mixed(monkeypatch, sources, out="c.npz", real="R2.npz", synthetic="S2.npz")
    assert digest(sources / "a.npz") == digest(sources / "b.npz") == digest(sources / "c.npz")


@pytest.mark.parametrize(
    "ratio, labelled, wanted",
    [
        (0.5, ["R"], False),
        (0.5, ["S"], False),
        (0.5, [], False),
        (0, ["S"], True),  # the real ones only say how many
        (0, ["R"], False),
        (1, ["R"], True),
    ],
)
def test_labels_are_kept_if_all_images_have_them(monkeypatch, sources, ratio, labelled, wanted):
    for name in {"R", "S"} - set(labelled):
        np.savez(sources / f"{name}.npz", arrays(sources / f"{name}.npz")["arr_0"])
    assert ("arr_1" in mixed(monkeypatch, sources, ratio=ratio)) is wanted


def test_all_real_needs_no_synthetic_images(monkeypatch, sources):
    content = mixed(monkeypatch, sources, ratio=1, synthetic=None)
    np.testing.assert_array_equal(content["arr_0"], tagged(REAL, 2400))


@pytest.mark.parametrize("class_cond", [True, False])
def test_a_folder_holds_the_same_set(monkeypatch, sources, class_cond):
    np.savez(sources / "R.npz", tagged(REAL, 60), np.arange(60) % 12)
    if not class_cond:
        np.savez(sources / "R.npz", tagged(REAL, 60))
    content = mixed(monkeypatch, sources, ratio=0.5)
    mixed(monkeypatch, sources, out="folder", ratio=0.5)
    dataset = open_dataset(sources / "folder", 4, class_cond)
    assert len(dataset) == 60 and len(list((sources / "folder").iterdir())) == 60
    images, labels = dataset.batch(np.arange(60))
    order = np.arange(60)
    if class_cond:  # "02_..." sorts before "10_..."
        assert sorted(set(content["arr_1"].tolist())) == list(range(12))
        order = np.argsort(content["arr_1"], kind="stable")
        np.testing.assert_array_equal(labels, content["arr_1"][order])
    np.testing.assert_array_equal(images, content["arr_0"][order])


def test_a_large_set_is_mixed_in_little_memory(monkeypatch, tmp_path):
    real, synthetic = noise(0, 12_000, 16), noise(1, 12_000, 16)  # 9 MB each
    np.savez(tmp_path / "R.npz", real)
    np.savez_compressed(tmp_path / "S.npz", synthetic)
    tracemalloc.start()
    try:
        mixed_plan = mix.plan(tmp_path / "R.npz", tmp_path / "S.npz", 0.5, 0)
        for part in mixed_plan:
            for images, _ in part.blocks():
                assert len(images) <= mix.BLOCK
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6
    assert sum(len(part.chosen) for part in mixed_plan) == 12_000


def test_mix_as_a_user_runs_it(sources):
    options = ["--real", "R.npz", "--synthetic", "S.npz", "--ratio", "0.05", "--out", "made/M.npz"]
    done = run("datasets/mix.py", *options, cwd=sources)
    assert done.returncode == 0 and done.stderr == ""  # no bar: this is no terminal
    assert done.stdout == "wrote made/M.npz: 120 of R.npz + 2280 of S.npz, with labels\n"
    assert len(arrays(sources / "made/M.npz")["arr_0"]) == 2400
    done = run("datasets/mix.py", *options[:5], "2", "--out", "N.npz", cwd=sources)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --ratio 2: must lie between 0 (all synthetic) and 1 (all real)\n"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "ratio above 1": ({"ratio": 5}, "--ratio 5"),
    "negative ratio": ({"ratio": -0.1}, "--ratio -0.1"),
    "ratio that is no number": ({"ratio": "nan"}, "--ratio nan"),
    "negative seed": ({"seed": -1}, "--seed -1"),
    "no synthetic images given": ({"synthetic": None}, "--synthetic is needed: 2280 of 2400"),
    "too few synthetic images": ({"synthetic": "few.npz"}, "holds 100 images, 2280 are needed"),
    "images of another size": ({"synthetic": "large.npz"}, r"8x8, those of .*R\.npz 4x4"),
    "real images missing": ({"real": "none.npz"}, "no such file"),
    "synthetic images missing": ({"synthetic": "none.npz"}, "no such file"),
    "no arr_0": ({"real": "unnamed.npz"}, "has no array 'arr_0'"),
    "floats": ({"synthetic": "floats.npz"}, "float32"),
    "truncated": ({"synthetic": "cut.npz"}, "not a readable npz"),
    "too few labels": ({"real": "labels.npz"}, "arr_1 must hold 2400 integers"),
    "output is an input": ({"out": "R.npz"}, "is one of the files to be mixed"),
    "folder is there": ({"out": "there"}, "is there already"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_mixing_are_told_and_leave_nothing(monkeypatch, sources, name):
    np.savez(sources / "few.npz", tagged(SYNTHETIC, 100))
    np.savez(sources / "large.npz", tagged(SYNTHETIC, 3000, 8))
    np.savez(sources / "unnamed.npz", images=tagged(REAL, 2400))
    np.savez(sources / "floats.npz", tagged(SYNTHETIC, 3000).astype(np.float32))
    np.savez(sources / "labels.npz", tagged(REAL, 2400), np.arange(2399))
    (sources / "cut.npz").write_bytes((sources / "S.npz").read_bytes()[:-100])
    (sources / "there").mkdir()
    before = {path.name: digest(path) for path in sources.glob("*.npz")}
    options, told = MISTAKES[name]
    with pytest.raises(UserError, match=told) as error:
        mixed(monkeypatch, sources, **options)
    assert "\n" not in str(error.value)
    assert {path.name: digest(path) for path in sources.glob("*.npz")} == before
    assert not [path for path in sources.iterdir() if path.name.endswith(".tmp")]


def test_damage_found_late_leaves_nothing(monkeypatch, sources):
    whole = bytearray((sources / "S.npz").read_bytes())
    whole[2000] ^= 0xFF  # within the compressed images
    (sources / "S.npz").write_bytes(whole)
    for out in ["M.npz", "folder"]:
        with pytest.raises(UserError, match=r"S\.npz: damaged archive"):
            mixed(monkeypatch, sources, out=out)
    assert sorted(os.listdir(sources)) == ["R.npz", "S.npz"]


# --- CIFAR-10 --------------------------------------------------------------------------------------


def rows_of(images: np.ndarray) -> np.ndarray:
    """Images [N, 32, 32, 3] as the official batches hold them, uint8 [N, 3072]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


@pytest.fixture(scope="module")
def cifar():
    """Twenty training and four test images, each class twice, and their labels, in official order."""
    images, order = noise(0, 24), np.random.default_rng(1)
    labels = np.concatenate([order.permutation(20) % 10, [3, 0, 9, 3]])
    return {"train": (images[:20], labels[:20]), "test": (images[20:], labels[20:])}


def batches_of(cifar) -> dict[str, object]:
    """The files of the official archive, in an order that is not theirs."""
    images, labels = cifar["train"]
    files: dict[str, object] = {"readme.html": "hello"}
    for i in [4, 2, 5, 1, 3]:
        part = slice(4 * i - 4, 4 * i)
        files[f"data_batch_{i}"] = {
            "batch_label": f"training batch {i} of 5",
            "labels": labels[part].tolist(),
            "data": rows_of(images[part]),
            "filenames": ["x.png"] * 4,
        }
    files["test_batch"] = {"labels": cifar["test"][1].tolist(), "data": rows_of(cifar["test"][0])}
    return files


def write_archive(path, files) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else pickle.dumps(content, 2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path, cifar):
    return write_archive(tmp_path / "cifar-10-python.tar.gz", batches_of(cifar))


def test_cifar_becomes_two_folders_of_pngs(monkeypatch, tmp_path, archive, cifar):
    call(monkeypatch, download, "--out", tmp_path / "made", "--archive", archive)
    assert sorted(os.listdir(tmp_path / "made")) == ["cifar_test", "cifar_train"]
    for split, (images, labels) in cifar.items():
        folder = tmp_path / "made" / f"cifar_{split}"
        names = [f"{CIFAR10_CLASSES[label]}_{i:05}.png" for i, label in enumerate(labels)]
        assert sorted(os.listdir(folder)) == sorted(names)
        for name, image in zip(names, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), image)
    # Training reads the same labels from it.
    dataset = open_dataset(tmp_path / "made/cifar_train", 32, class_cond=True)
    order = np.argsort(cifar["train"][1], kind="stable")
    images, labels = dataset.batch(np.arange(20))
    assert dataset.num_classes == 10
    np.testing.assert_array_equal(labels, cifar["train"][1][order])
    np.testing.assert_array_equal(images, cifar["train"][0][order])


def test_the_reference_from_the_archive_and_from_the_folder(monkeypatch, tmp_path, archive, cifar):
    images, labels = cifar["train"]
    call(monkeypatch, cifar_npz, "--in", archive, "--out", tmp_path / "a.npz")
    content = arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(content["arr_0"], images)
    np.testing.assert_array_equal(content["arr_1"], labels)

    call(monkeypatch, download, "--out", tmp_path, "--archive", archive)
    call(monkeypatch, cifar_npz, "--in", tmp_path / "cifar_train", "--out", tmp_path / "b.npz")
    content, order = arrays(tmp_path / "b.npz"), np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(content["arr_0"], images[order])
    np.testing.assert_array_equal(content["arr_1"], labels[order])


def test_cifar_scripts_as_a_user_runs_them(tmp_path, archive, cifar):
    done = run("datasets/download_cifar10.py", "--archive", archive.name, "--out", ".", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "wrote cifar_train: 20 images\nwrote cifar_test: 4 images\n"
    done = run("datasets/download_cifar10.py", "--archive", archive.name, "--out", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cifar_train: is there already") and done.stderr.count("\n") == 1
    done = run("evaluations/cifar_npz.py", "--in", archive.name, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "wrote cifar10_train.npz: 20 images, 10 classes\n"
    np.testing.assert_array_equal(arrays(tmp_path / "cifar10_train.npz")["arr_0"], cifar["train"][0])


def test_an_existing_split_is_refused_before_anything_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (tmp_path / "cifar_test").mkdir()
    with pytest.raises(UserError, match="cifar_test: is there already"):
        call(monkeypatch, download, "--out", tmp_path)
    assert os.listdir(tmp_path) == ["cifar_test"]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch owned",)


def changed(cifar, name: str, **values) -> dict[str, object]:
    files = batches_of(cifar)
    batch = files[name]
    assert isinstance(batch, dict)
    batch.update(values)
    return files


BAD_BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "runs code": ({"labels": Hostile()}, r"data_batch_3: refused, nothing in it was run.*system"),
    "signed": ({"data": np.zeros((4, 3072), np.int8)}, r"data_batch_3: 'data' is int8 \[4, 3072\]"),
    "of another size": ({"data": np.zeros((4, 12288), np.uint8)}, r"\[4, 12288\], it should be"),
    "no array": ({"data": "pixels"}, "'data' is a str, no array"),
    "too few labels": ({"labels": [1, 2, 3]}, "'labels' is no list of 4 labels"),
    "no such class": ({"labels": [1, 2, 3, 10]}, "'labels' holds something outside 0 to 9"),
    "labels that are no numbers": ({"labels": ["a", 1, 2, 3]}, "'labels' holds something outside 0 to 9"),
    "huge labels": ({"labels": [1, 2, 3, 1 << 80]}, "'labels' holds something outside 0 to 9"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(monkeypatch, tmp_path, cifar, name):
    monkeypatch.chdir(tmp_path)
    values, told = BAD_BATCHES[name]
    path = write_archive(tmp_path / "bad.tar.gz", changed(cifar, "data_batch_3", **values))
    for module, source in [(download, "--archive"), (cifar_npz, "--in")]:
        with pytest.raises(UserError, match=told) as error:
            call(monkeypatch, module, source, path, "--out", tmp_path / "made.npz")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["bad.tar.gz"]


def test_archives_that_are_not_the_official_one_are_refused(monkeypatch, tmp_path, cifar):
    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told):
            call(monkeypatch, cifar_npz, "--in", tmp_path / "a.tar.gz", "--out", tmp_path / "made.npz")

    files = batches_of(cifar)
    del files["data_batch_2"], files["data_batch_5"]
    write_archive(tmp_path / "a.tar.gz", files)
    refused("it has no data_batch_2, data_batch_5$")

    write_archive(tmp_path / "a.tar.gz", {**batches_of(cifar), "data_batch_3": [1, 2]})
    refused("data_batch_3: is no batch of images")

    (tmp_path / "a.tar.gz").write_bytes(b"hello" * 100)
    refused("damaged, or not the official")

    with tarfile.open(tmp_path / "a.tar.gz", "w") as tar:  # a header that claims a terabyte
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 1 << 40
        tar.addfile(info)
    refused(f"claims to be of {1 << 40} bytes")


def test_a_truncated_archive_is_told(monkeypatch, tmp_path, archive):
    whole = archive.read_bytes()
    for end in [0, 5, 100, len(whole) // 2, len(whole) - 3000, len(whole) - 20]:
        archive.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: "):
            call(monkeypatch, download, "--archive", archive, "--out", tmp_path / "made")
    assert os.listdir(tmp_path) == [archive.name]


def test_a_changed_pixel_in_an_archive_is_told(monkeypatch, tmp_path, archive):
    whole = bytearray(archive.read_bytes())
    for place in [len(whole) // 3, len(whole) // 2, len(whole) - 6]:
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: "):
            call(monkeypatch, cifar_npz, "--in", archive, "--out", tmp_path / "made.npz")
    assert os.listdir(tmp_path) == [archive.name]


def fake_torchvision(monkeypatch, cifar10) -> None:
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    monkeypatch.setattr(datasets, "CIFAR10", cifar10, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_the_archive_is_downloaded_through_torchvision(monkeypatch, tmp_path, archive, cifar):
    class Downloads:
        filename = "cifar-10-python.tar.gz"

        def __init__(self, root, download):
            assert download
            (Path(root) / self.filename).write_bytes(archive.read_bytes())

    fake_torchvision(monkeypatch, Downloads)
    call(monkeypatch, download, "--out", tmp_path / "made")
    assert sorted(os.listdir(tmp_path / "made")) == ["cifar_test", "cifar_train"]  # and nothing else
    assert len(open_dataset(tmp_path / "made/cifar_train", 32, True)) == len(cifar["train"][0])


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("File not found or corrupted.")])
def test_a_failed_download_is_told(monkeypatch, tmp_path, error):
    class Fails:
        filename = "cifar-10-python.tar.gz"

        def __init__(self, root, download):
            raise error

    fake_torchvision(monkeypatch, Fails)
    with pytest.raises(UserError, match=r"could not be downloaded \(.*(no route|corrupted).*--archive"):
        call(monkeypatch, download, "--out", tmp_path / "made")
    assert os.listdir(tmp_path / "made") == []


def test_a_missing_torchvision_is_told(monkeypatch, tmp_path):
    for name in ("torchvision", "torchvision.datasets"):  # another test may have imported them
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"torchvision cannot be imported .*--archive"):
        call(monkeypatch, download, "--out", tmp_path / "made")
    assert not (tmp_path / "made").exists()


# --- CelebA-64 -------------------------------------------------------------------------------------


def test_the_celeba_reference_is_what_training_sees(monkeypatch, tmp_path):
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for i in [3, 1, 10, 2]:
        small = Image.fromarray(noise(i, 1, 9)[0])
        small.resize((178, 218)).save(folder / f"{i:06}.jpg")
    call(monkeypatch, celeba64_npz, "--in", folder, "--out", tmp_path / "c.npz")
    content = arrays(tmp_path / "c.npz")
    assert set(content) == {"arr_0"}
    assert content["arr_0"].shape == (4, 64, 64, 3) and content["arr_0"].dtype == np.uint8
    trained_on = open_dataset(folder, 64, class_cond=False)
    np.testing.assert_array_equal(content["arr_0"], trained_on.batch(np.arange(4))[0])
    np.testing.assert_array_equal(content["arr_0"][3], read_image(folder / "000010.jpg", 64))
    call(monkeypatch, celeba64_npz, "--in", folder, "--out", tmp_path / "again.npz")
    assert digest(tmp_path / "again.npz") == digest(tmp_path / "c.npz")


def test_colors_keep_their_places(monkeypatch, tmp_path):
    Image.new("RGB", (64, 64), (255, 128, 0)).save(tmp_path / "a.png")
    call(monkeypatch, celeba64_npz, "--in", tmp_path, "--out", tmp_path / "c.npz")
    assert arrays(tmp_path / "c.npz")["arr_0"][0, 5, 6].tolist() == [255, 128, 0]


def test_a_folder_builder_tells_what_is_wrong_and_leaves_nothing(monkeypatch, tmp_path):
    out = tmp_path / "made" / "c.npz"
    with pytest.raises(UserError, match="no such folder"):
        call(monkeypatch, celeba64_npz, "--in", tmp_path / "none", "--out", out)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        call(monkeypatch, celeba64_npz, "--in", tmp_path / "in", "--out", out)
    Image.new("RGB", (64, 64)).save(tmp_path / "in/1.png")
    (tmp_path / "in/2.png").write_text("hello")
    with pytest.raises(UserError, match=r"2\.png: not a readable image"):
        call(monkeypatch, celeba64_npz, "--in", tmp_path / "in", "--out", out)
    assert os.listdir(out.parent) == []


def test_a_folder_builder_replaces_images_of_its_own_kind_alone(monkeypatch, tmp_path):
    picture, out = tmp_path / "in/1.png", tmp_path / "made.npz"
    picture.parent.mkdir()
    Image.new("RGB", (64, 64)).save(picture)
    before = picture.read_bytes()
    with pytest.raises(UserError, match=r"1\.png: is no archive of images, and would be replaced"):
        call(monkeypatch, celeba64_npz, "--in", picture.parent, "--out", picture)
    assert picture.read_bytes() == before
    out.touch()  # as mktemp leaves it
    for _ in range(2):
        call(monkeypatch, celeba64_npz, "--in", picture.parent, "--out", out)
    assert len(arrays(out)["arr_0"]) == 1


def test_images_in_a_folder_and_in_one_below_have_no_labels(monkeypatch, tmp_path):
    for name in ("in/1.png", "in/below/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    call(monkeypatch, celeba64_npz, "--in", tmp_path / "in", "--out", tmp_path / "out.npz")
    content = arrays(tmp_path / "out.npz")
    assert len(content["arr_0"]) == 2 and "arr_1" not in content


# --- ImageNet-32 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet():
    """Thirty images and labels from 0, three for each of ten batches."""
    labels = np.random.default_rng(2).integers(0, 1000, 30)
    labels[:2] = 0, 999
    return noise(3, 30), labels


def write_imagenet(folder, imagenet, suffix="", skip=()) -> Path:
    images, labels = imagenet
    folder.mkdir(exist_ok=True)
    for i in range(10):
        part = slice(3 * i, 3 * i + 3)
        batch = {"data": rows_of(images[part]), "labels": (labels[part] + 1).tolist(), "mean": np.zeros(3072)}
        path = folder / f"train_data_batch_{i + 1}{suffix}"
        if i + 1 in skip:
            continue
        if suffix:
            np.savez(path, **batch)
        else:
            path.write_bytes(pickle.dumps(batch, 4))
    (folder / "val_data").write_bytes(b"another set")
    return folder


def test_imagenet_from_pickles_and_from_npz(monkeypatch, tmp_path, imagenet):
    for suffix in ["", ".npz"]:
        folder = write_imagenet(tmp_path / f"batches{suffix}", imagenet, suffix)
        call(monkeypatch, imagenet32_npz, "--in", folder, "--out", tmp_path / f"all{suffix}.npz")
    content = arrays(tmp_path / "all.npz")
    np.testing.assert_array_equal(content["arr_0"], imagenet[0])  # batch 10 comes last
    np.testing.assert_array_equal(content["arr_1"], imagenet[1])  # from 0
    assert digest(tmp_path / "all.npz") == digest(tmp_path / "all.npz.npz")


def test_imagenet_from_folders_of_images(monkeypatch, tmp_path):
    for i, name in enumerate(["n02/b.png", "n01/z.png", "n02/a.png"]):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 1)[0]).save(path)
    call(monkeypatch, imagenet32_npz, "--in", tmp_path / "tree", "--out", tmp_path / "all.npz")
    content = arrays(tmp_path / "all.npz")
    np.testing.assert_array_equal(content["arr_0"], np.concatenate([noise(i, 1) for i in [1, 2, 0]]))
    assert content["arr_1"].tolist() == [0, 1, 1]


def test_images_whose_names_tell_one_class_have_no_labels(monkeypatch, tmp_path):
    (tmp_path / "val").mkdir()
    for i in range(2):
        Image.fromarray(noise(i, 1)[0]).save(tmp_path / f"val/ILSVRC2012_val_{i}.png")
    call(monkeypatch, imagenet32_npz, "--in", tmp_path / "val", "--out", tmp_path / "val.npz")
    assert set(arrays(tmp_path / "val.npz")) == {"arr_0"}


def test_official_images_come_in_blocks(monkeypatch, tmp_path, archive, cifar, imagenet):
    monkeypatch.setattr(official_batches, "BLOCK", 2)
    folders = [write_imagenet(tmp_path / f"batches{suffix}", imagenet, suffix) for suffix in ("", ".npz")]
    found = [cifar10_images(archive, "test"), *map(imagenet32_images, folders)]
    for image_set, (images, labels) in zip(found, [cifar["test"], imagenet, imagenet], strict=True):
        blocks = list(image_set.blocks)
        assert image_set.count == len(images)
        assert max(len(block) for block, _ in blocks) == 2
        np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), images)
        np.testing.assert_array_equal(np.concatenate([part for _, part in blocks]), labels)
    assert imagenet32_images(tmp_path) is None


def test_imagenet_as_a_user_runs_it(tmp_path, imagenet):
    folder = write_imagenet(tmp_path / "batches", imagenet)
    done = run("evaluations/imagenet32_npz.py", "--in", folder.name, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    classes = len(set(imagenet[1].tolist()))
    assert done.stdout == f"wrote ImageNet32_train_all.npz: 30 images, {classes} classes\n"


def test_incomplete_or_damaged_batches_are_refused_and_leave_nothing(monkeypatch, tmp_path, imagenet):
    def refused(folder, told: str) -> None:
        with pytest.raises(UserError, match=told) as error:
            call(monkeypatch, imagenet32_npz, "--in", folder, "--out", tmp_path / "made" / "all.npz")
        assert "\n" not in str(error.value)

    refused(
        write_imagenet(tmp_path / "a", imagenet, skip=(3, 10)),
        "lacks train_data_batch_3, train_data_batch_10 ",
    )
    folder = write_imagenet(tmp_path / "b", imagenet)
    np.savez(folder / "train_data_batch_4.npz", data=np.zeros((1, 3072), np.uint8), labels=[1])
    refused(folder, r"holds train_data_batch_4 and train_data_batch_4\.npz")

    folder = write_imagenet(tmp_path / "c", imagenet)
    last = folder / "train_data_batch_10"
    last.write_bytes(last.read_bytes()[:-1])
    refused(folder, "train_data_batch_10: truncated")
    last.write_bytes(pickle.dumps(Hostile()))
    refused(folder, r"train_data_batch_10: refused.*system")
    last.write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))
    refused(folder, "train_data_batch_10: 'labels' holds something outside 1 to 1000")

    folder = write_imagenet(tmp_path / "d", imagenet, ".npz")
    last = folder / "train_data_batch_10.npz"
    np.savez(last, data=np.zeros((1, 3, 32, 32), np.uint8), labels=[1])
    refused(folder, r"'data' is uint8 \[1, 3, 32, 32\], it should be uint8 \[N, 3072\]")
    np.savez(last, data=np.zeros((1, 3072), np.uint8), labels=[1.0])
    refused(folder, "'labels' holds something outside 1 to 1000")
    np.savez(last, data=np.zeros((1, 3072), np.uint8))
    refused(folder, "has no array 'labels'")
    assert not (tmp_path / "made").exists()


def test_imagenet_is_written_in_little_memory(monkeypatch, tmp_path):
    images = noise(0, 1500)  # 4.6 MB in each of ten files
    folder = tmp_path / "batches"
    folder.mkdir()
    for i in range(1, 11):
        np.savez(folder / f"train_data_batch_{i}.npz", data=rows_of(images), labels=np.full(1500, i))
    tracemalloc.start()
    try:
        call(monkeypatch, imagenet32_npz, "--in", folder, "--out", tmp_path / "all.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6  # of 46 MB
    assert arrays(tmp_path / "all.npz")["arr_0"].shape == (15_000, 32, 32, 3)


# --- folders of PNGs -------------------------------------------------------------------------------


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    def blocks():
        yield noise(0, 2), None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_image_folder(tmp_path / "made", 4, blocks(), str)
    assert os.listdir(tmp_path) == []


def test_numbers_are_wide_enough_to_sort(tmp_path):
    write_image_folder(tmp_path / "a", 100_001, [(noise(0, 1, 2), None)], str)
    write_image_folder(tmp_path / "b", 100_000, [(noise(0, 1, 2), np.array([7]))], lambda label: f"c{label}")
    assert os.listdir(tmp_path / "a") == ["000000.png"]
    assert os.listdir(tmp_path / "b") == ["c7_00000.png"]
