"""The embedded score: real digits, the noise statistic, the shipped classifier, digits-FD and its floor."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from evaluations.digits import NOISE_ROUGHNESS, is_noise, roughness
from evaluations.digits_classifier import (
    DEFAULT_WEIGHTS,
    DigitsClassifier,
    DigitsExtractor,
    load_classifier,
    to_input,
)
from evaluations.digits_floor import real_floor
from evaluations.evaluator import evaluate
from evaluations.results import DigitsResult, format_result, format_table, values
from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.files import sha256_of
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.torch_file import read_torch_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real():
    return load_digit_images()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, real):
    """real.npz with all digits, and files of samples that are good or bad in known ways."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = real
    generator = np.random.default_rng(0)
    sevens = images[labels == 7]
    sets = {
        "real": images,
        "half": images[generator.permutation(len(images))[:900]],
        "noise": generator.integers(0, 256, (900, 16, 16, 3), dtype=np.uint8),
        "sevens": sevens[generator.integers(len(sevens), size=900)],
        "one image": np.repeat(images[:1], 900, axis=0),
    }
    for name, array in sets.items():
        np.savez(folder / f"{name}.npz", array)
    return folder


@pytest.fixture(scope="module")
def scores(folder):
    return {
        path.stem: evaluate(folder / "real.npz", path, backend="digits")
        for path in sorted(folder.glob("*.npz"))
        if "ref-stats" not in path.name
    }


# Images


def test_the_images_are_scikit_learns_enlarged(real):
    images, labels = real
    assert (images.shape, images.dtype, labels.shape) == ((1797, 16, 16, 3), np.uint8, (1797,))
    assert (images[..., 0] == images[..., 1]).all()
    assert (images[..., 0] == images[..., 2]).all()
    np.testing.assert_array_equal(labels, load_digits().target)
    # Averaged back to 8x8, they are the originals but for the smoothing.
    back = images[..., 0].reshape(-1, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(back.ravel(), load_digits().images.ravel())[0, 1] > 0.99
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_the_script_writes_the_digits(tmp_path, real):
    command = [sys.executable, ROOT / "datasets" / "digits.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1797 images of 16x16" in done.stdout
    npz = NpzFile(tmp_path / "digits.npz")
    np.testing.assert_array_equal(npz.load("arr_0"), real[0])
    np.testing.assert_array_equal(npz.load("arr_1"), real[1])


# Noise


def test_roughness_knows_noise_from_digits(real):
    images, _ = real
    assert roughness(images).max() < 0.14
    assert not is_noise(images).any()
    white = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    assert roughness(white).mean() == pytest.approx(207 / 255, abs=0.01)
    assert is_noise(white).all()


def test_roughness_knows_noise_from_digits_at_twice_the_size():
    images, _ = load_digit_images(32)
    assert roughness(images).max() < 0.15
    coarse = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    noise = coarse.repeat(2, axis=1).repeat(2, axis=2)  # smooth in pixels, but too fine for 8x8
    assert is_noise(noise).all()


def test_roughness_grows_with_noise_and_ignores_contrast(real):
    images = real[0][:100] / 127.5 - 1
    noise = np.random.default_rng(0).standard_normal(images.shape)
    means = [roughness(images + strength * noise).mean() for strength in (0, 0.2, 0.5, 1, 3)]
    assert means == sorted(means)
    assert means[1] < NOISE_ROUGHNESS < means[3]
    np.testing.assert_allclose(roughness(0.1 * images + 3), roughness(images), rtol=1e-6)
    np.testing.assert_array_equal(roughness(np.full((2, 16, 16, 3), 200, np.uint8)), 0)


# Classifier


def test_the_shipped_classifier_reads_held_out_digits(real):
    images, labels = real
    _, held_out = train_test_split(range(1797), test_size=0.2, stratify=labels, random_state=0)
    extractor = DigitsExtractor()
    features, spatial = extractor.extract(images[held_out])
    assert (features.shape, features.dtype, spatial) == ((360, 64), np.float32, None)
    probabilities = extractor.probabilities(features)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert (probabilities.argmax(1) == labels[held_out]).mean() >= 0.98
    with th.no_grad():
        whole = load_classifier()(to_input(images[held_out])).softmax(1)
    np.testing.assert_allclose(probabilities, whole, rtol=1e-5)


def test_the_embedded_networks_have_the_sizes_that_are_stated():
    sizes = {
        name: sum(tensor.numel() for tensor in read_torch_file(ROOT / f"model/{name}.pt").values())
        for name in ("digits_teacher", "digits32_teacher", "digits_classifier")
    }
    sections = (ROOT / "model/README.md").read_text().split("\n## ")
    for name, size in sizes.items():
        (section,) = (text for text in sections if text.startswith(f"`{name}.pt`"))
        assert re.findall(r"([\d,]+) parameters", section) == [f"{size:,}"]
    stated = f"{sizes['digits_classifier']:,} parameters"
    for text in (DigitsClassifier.__doc__, (ROOT / "docs/evaluation.md").read_text()):
        assert re.findall(r"[\d,]+ parameters", text) == [stated]


def test_classifier_weights_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no digits classifier at"):
        load_classifier(tmp_path / "nowhere.pt")
    th.save(th.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt: not the weights of the digits classifier"):
        load_classifier(tmp_path / "other.pt")


def train(*arguments):
    command = [sys.executable, ROOT / "evaluations" / "train_digits_classifier.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_training_learns_and_repeats_exactly(tmp_path):
    for name in ("a", "b"):
        done = train("--epochs", 3, "--seed", 5, "--out", tmp_path / f"{name}.pt")
        assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("accuracy ")[1].split()[0]) > 0.7
    assert sha256_of(tmp_path / "a.pt") == sha256_of(tmp_path / "b.pt")
    refused = train("--epochs", 0, "--out", tmp_path / "c.pt")
    assert (refused.returncode, refused.stderr) == (1, "error: --epochs must be at least 1\n")


@pytest.mark.slow
def test_the_default_training_reaches_the_shipped_accuracy(tmp_path):
    done = train("--out", tmp_path / "c.pt")
    assert float(done.stdout.split("accuracy ")[1].split()[0]) >= 0.98


# Scores


def test_real_digits_score_well(scores):
    half = scores["half"]
    assert half.fd < 0.6
    assert half.noise_share == 0
    assert half.class_balance > 0.99
    assert half.confidence > 0.9
    assert half.precision == 1 and half.recall > 0.9  # its images are the reference's
    assert (half.n, half.n_reference, sum(half.histogram)) == (900, 1797, 900)
    assert half.weights_sha256 == sha256_of(DEFAULT_WEIGHTS)
    assert scores["real"].fd < 1e-9


def test_noise_is_told(scores):
    noise = scores["noise"]
    assert noise.noise_share == 1
    assert noise.fd > 50 * scores["half"].fd
    assert noise.precision < 0.5 and noise.recall == 0


def test_collapse_is_told_by_balance_and_distance_but_not_by_confidence(scores):
    for name in ("sevens", "one image"):
        collapsed = scores[name]
        assert collapsed.class_balance < 0.1
        assert collapsed.fd > 20 * scores["half"].fd
        assert collapsed.confidence > 0.8
        assert collapsed.precision == 1 and collapsed.recall < 0.15
        assert max(collapsed.histogram) > 880


def test_the_distance_grows_with_added_noise(tmp_path, folder, real):
    generator = np.random.default_rng(0)
    found = []
    for strength in (0, 0.2, 0.5, 1):
        noisy = real[0] / 127.5 - 1 + strength * generator.standard_normal(real[0].shape)
        np.savez(tmp_path / "noisy.npz", np.rint((noisy.clip(-1, 1) + 1) * 127.5).astype(np.uint8))
        found.append(evaluate(folder / "real.npz", tmp_path / "noisy.npz", backend="digits"))
    assert [score.fd for score in found] == sorted(score.fd for score in found)
    assert [score.noise_share for score in found] == sorted(score.noise_share for score in found)


def test_intervals_hold_the_scores(folder):
    found = evaluate(folder / "real.npz", folder / "half.npz", backend="digits", intervals=20)
    assert set(found.intervals) == set(values(found))
    for name, (low, high) in found.intervals.items():
        assert low <= values(found)[name] <= high, name
    assert found.intervals["class_balance"][1] <= 1
    assert found.intervals["fd"][1] > found.fd > 0


def test_the_table_has_a_row_for_each_file(scores, tmp_path):
    lines = format_table(list(scores.values())).splitlines()
    assert len(lines) == 1 + len(scores)
    assert lines[0].split()[:3] == ["samples", "N", "digits-FD"]
    assert "sevens.npz" in "".join(lines)
    assert len({len(line) for line in lines}) == 1
    assert isinstance(scores["half"], DigitsResult)


def test_the_table_tells_files_of_one_name_apart(folder, scores):
    results = [
        dataclasses.replace(scores["half"], samples=f"runs/{run}/samples.npz") for run in ("first", "second")
    ]
    rows = format_table(results).splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["first/samples.npz", "second/samples.npz"]


def test_the_command_gives_a_table_and_a_record(folder, scores, tmp_path):
    names = ("half", "noise")
    files = [folder / f"{name}.npz" for name in ("real", *names)]
    command = [sys.executable, ROOT / "evaluations" / "evaluator.py", *files, "--backend", "digits"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "r.json"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == format_table([scores[name] for name in names]) + "\n"
    assert done.stderr == ""
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["fd"] for record in records] == pytest.approx([scores[name].fd for name in names])


# Where the samples come from

MADE = {"model": "ema_0.9999_100000.pt", "step": 100000, "process": {"T": 1000}, "sampler": "ddim", "seed": 0,
        "config": {"a": [1, None]}}  # fmt: skip


def test_the_provenance_of_samples_stands_in_the_record(folder, scores, tmp_path):
    np.savez(tmp_path / "made.npz", NpzFile(folder / "half.npz").load("arr_0"), provenance=json.dumps(MADE))
    files = folder / "real.npz", tmp_path / "made.npz", "--output", tmp_path / "r.json"
    command = [sys.executable, ROOT / "evaluations" / "evaluator.py", *files, "--backend", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    last = done.stdout.splitlines()[-1]
    assert last == "samples made by: model ema_0.9999_100000.pt, step 100000, sampler ddim, seed 0"
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert record["samples_provenance"] == MADE
    assert scores["half"].samples_provenance is None
    assert values(scores["half"]) == pytest.approx({name: record[name] for name in values(scores["half"])})


def test_a_provenance_may_be_of_either_byte_order(tmp_path):
    np.savez(tmp_path / "made.npz", provenance=np.array(json.dumps(MADE), ">U999"))
    assert NpzFile(tmp_path / "made.npz").load_json("provenance") == MADE


def test_a_provenance_prints_as_one_line_whatever_it_holds(scores):
    strange = {"model": "a\nb\x1b[2J", "step": [1], "sampler": "x" * 999, "seed": None}
    lines = format_result(dataclasses.replace(scores["half"], samples_provenance=strange)).splitlines()
    assert lines[-1] == f"samples made by: model 'a\\nb\\x1b[2J', sampler {'x' * 60}"
    plain = format_result(scores["half"])
    assert format_result(dataclasses.replace(scores["half"], samples_provenance={})) == plain


@pytest.mark.filterwarnings("ignore:.*images are fewer than:UserWarning")
@pytest.mark.parametrize(
    "entry",
    [
        np.array("{"),
        np.array("[1]"),
        np.array('{"seed": NaN}'),
        np.array('{"a": ' * 100_000),
        np.array(['{"seed": 0}']),
        np.array(7),
        np.array(b"{}"),
        np.array(json.dumps({"config": "x" * (1 << 20)})),
        np.frombuffer(b"\xff\xff\xff\x7f", "<U1").reshape(()),  # beyond Unicode
    ],
    ids=["no JSON", "list", "NaN", "deep", "array", "number", "bytes", "long", "no text"],
)
def test_a_provenance_that_is_none_is_left_out_with_a_warning(folder, tmp_path, entry):
    np.savez(tmp_path / "made.npz", load_digit_images()[0][:20], provenance=entry)
    with pytest.warns(UserWarning, match=r"made\.npz: 'provenance' holds no JSON object") as warned:
        found = evaluate(folder / "real.npz", tmp_path / "made.npz", backend="digits")
    assert found.samples_provenance is None
    assert not any("\n" in str(warning.message) for warning in warned)


# The floor


def test_the_floor_is_what_perfect_samples_of_that_number_score(folder, real):
    floors = {n: real_floor(folder / "real.npz", n, draws=30) for n in (300, 1000)}
    assert floors[300].fd > 2 * floors[1000].fd > 0
    assert floors[1000].noise_share == 0
    assert floors[1000].class_balance > 0.99
    np.savez(folder / "drawn.npz", real[0][np.random.default_rng(9).integers(len(real[0]), size=1000)])
    drawn = evaluate(folder / "real.npz", folder / "drawn.npz", backend="digits")
    assert abs(drawn.fd - floors[1000].fd) < 4 * floors[1000].fd_std
    assert floors[1000] == real_floor(folder / "real.npz", 1000, draws=30)


def test_a_floor_needs_images_and_draws(folder):
    with pytest.raises(UserError, match="at least 2 images and 2 draws"):
        real_floor(folder / "real.npz", 1)
    np.savez(folder / "large.npz", np.zeros((20, 24, 24, 3), np.uint8))
    with pytest.raises(UserError, match="16x16 or 32x32 are wanted"):
        real_floor(folder / "large.npz", 100)
