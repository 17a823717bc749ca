"""The Inception evaluator on whole files: golden group g6, meaning, cached and stored statistics, records."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_data import GOLDEN, manifest, unpack_golden_graph
from scipy import special

from evaluations import inception_tensorflow
from evaluations import reference as reference_module
from evaluations.evaluator import evaluate
from evaluations.inception_tensorflow import TensorflowExtractor
from evaluations.judge import Judge
from evaluations.metrics import Gaussian, frechet_distance, gaussian_of
from evaluations.reference import cache_path
from evaluations.results import format_result, values
from guided_diffusion.config.settings import Run
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import sha256_of
from guided_diffusion.io.image_sets import open_images
from guided_diffusion.io.npz_reader import NpzFile

EVALUATOR = Path(__file__).parents[1] / "evaluations" / "evaluator.py"
EXPECTED = manifest("g6_evaluator.json")["images"]

# Far fewer images than features: each of these files earns that warning, which has its own test.
pytestmark = pytest.mark.filterwarnings("ignore:.*images are fewer than:UserWarning")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return unpack_golden_graph(tmp_path_factory.mktemp("graph") / "inception.pb")


@pytest.fixture(scope="module")
def extractor(graph):
    return TensorflowExtractor(graph)


@pytest.fixture(scope="module")
def images():
    """The golden images: ref uint8 [600, 32, 32, 3], sample uint8 [500, 32, 32, 3]."""
    return {side: NpzFile(GOLDEN / f"g6_images_{side}.npz").load("arr_0") for side in ("ref", "sample")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden image files in a folder where their statistics may be cached."""
    folder = tmp_path_factory.mktemp("images")
    for side in ("ref", "sample"):
        shutil.copy(GOLDEN / f"g6_images_{side}.npz", folder / f"{side}.npz")
    return folder


@pytest.fixture(scope="module")
def result(folder, graph):
    return evaluate(folder / "ref.npz", folder / "sample.npz", weights=graph)


@pytest.fixture
def small(tmp_path, images):
    """A folder with 40 reference and 30 sample images, quick to run through the graph."""
    np.savez(tmp_path / "ref.npz", images["ref"][:40])
    np.savez(tmp_path / "sample.npz", images["sample"][:30])
    return tmp_path


def run(*arguments):
    return subprocess.run(
        [sys.executable, EVALUATOR, *map(str, arguments)], capture_output=True, text=True, check=False
    )


# Golden numbers


def test_golden_scores(result):
    reference, printed = EXPECTED["float64_reference"], EXPECTED["printed_by_original"]
    assert result.inception_score == pytest.approx(float(printed["Inception Score"]), rel=1e-5)
    # The graph computes in float32, each processor with its own rounding.
    assert result.fid == pytest.approx(reference["fid"], rel=1e-6)
    assert result.fid == pytest.approx(float(printed["FID"]), rel=1e-4)
    assert result.sfid == pytest.approx(reference["sfid"], rel=1e-6)
    assert result.sfid == pytest.approx(float(printed["sFID"]), rel=1e-4)
    assert [result.precision, result.recall] == reference["prec_recall"]
    assert abs(result.precision - float(printed["Precision"])) <= 3 / 500  # the original: float16
    assert abs(result.recall - float(printed["Recall"])) <= 3 / 600


@pytest.mark.parametrize("side", ["ref", "sample"])
def test_golden_activations(extractor, images, side):
    with np.load(GOLDEN / "g6_activations.npz") as archive:
        golden = {name: archive[f"{side}/{name}"] for name in ("pool_first_16", "spatial_first_4")}
        means = {name: archive[f"{side}/{name}"] for name in ("pool_row_mean", "spatial_row_mean")}
    pool, spatial = extractor.extract(images[side][:64])
    np.testing.assert_allclose(pool[:16], golden["pool_first_16"], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(spatial[:4], golden["spatial_first_4"], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(pool.mean(1), means["pool_row_mean"][:64], rtol=1e-5)
    np.testing.assert_allclose(spatial.mean(1), means["spatial_row_mean"][:64], rtol=1e-5)


def test_probabilities_leave_out_the_bias(extractor, graph, images):
    import tensorflow as tf

    features, _ = extractor.extract(images["sample"][:4])
    definition = tf.compat.v1.GraphDef.FromString(graph.read_bytes())
    (kernel,) = (n for n in definition.node if n.name == "softmax/weights/half")
    kernel = tf.make_ndarray(kernel.attr["value"].tensor).astype(float)
    expected = special.softmax(features.astype(float) @ kernel, axis=1)
    np.testing.assert_allclose(extractor.probabilities(features), expected, rtol=1e-3, atol=1e-6)


# What the scores must mean


def test_batch_size_and_order_make_no_difference(extractor, small, images):
    ours = evaluate(small / "ref.npz", small / "sample.npz", weights=_path(extractor, small))
    np.savez(small / "turned.npz", images["sample"][:30][::-1])
    turned = evaluate(
        small / "ref.npz",
        small / "turned.npz",
        weights=_path(extractor, small),
        batch_size=7,
        use_cache=False,
    )
    for name, value in values(ours).items():
        assert values(turned)[name] == pytest.approx(value, rel=1e-5), name


def _path(extractor, folder):
    return unpack_golden_graph(folder / "graph.pb")


@pytest.mark.slow
def test_identical_sets(folder, graph):
    same = evaluate(folder / "ref.npz", folder / "ref.npz", weights=graph)
    assert same.fid < 1e-9
    assert same.sfid < 1e-9
    assert (same.precision, same.recall) == (1, 1)


def test_a_collapsed_set_is_precise_but_recalls_nothing(small, graph, images):
    np.savez(small / "collapsed.npz", np.repeat(images["ref"][:1], 30, axis=0))
    spread = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    collapsed = evaluate(small / "ref.npz", small / "collapsed.npz", weights=graph)
    assert collapsed.precision == 1
    assert collapsed.recall <= 1 / 40
    assert collapsed.inception_score == pytest.approx(1)
    assert collapsed.fid > spread.fid


@pytest.mark.slow
def test_fid_grows_with_added_noise(small, graph, images):
    generator = np.random.default_rng(0)
    fids = []
    for strength in (0, 20, 60, 120):
        noisy = images["ref"][:40] + strength * generator.standard_normal((40, 32, 32, 3))
        np.savez(small / "noisy.npz", np.rint(noisy.clip(0, 255)).astype(np.uint8))
        fids.append(evaluate(small / "ref.npz", small / "noisy.npz", weights=graph).fid)
    assert fids == sorted(fids)
    assert fids[3] > 2 * fids[1] > 0


def test_optional_scores_and_intervals(small, graph):
    plain = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    assert (plain.kid, plain.density, plain.coverage, plain.intervals) == (None, None, None, {})
    full = evaluate(
        small / "ref.npz", small / "sample.npz", weights=graph, kid=True, density_coverage=True, intervals=3
    )
    assert values(plain).items() <= values(full).items()
    assert set(full.intervals) == set(values(full)) == set(values(plain)) | {"kid", "density", "coverage"}
    for name, (low, high) in full.intervals.items():
        assert low <= values(full)[name] <= high, name
    assert full.intervals["fid"][0] < full.fid < full.intervals["fid"][1]


# Reference statistics: cached and stored


def test_statistics_are_cached_and_reused(small, graph, monkeypatch):
    first = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    assert first.reference_statistics == "computed"
    assert cache_path(small / "ref.npz", "tensorflow").is_file()
    monkeypatch.setattr(reference_module, "extract_features", None)  # the reference is not run again
    again = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    assert again.reference_statistics == "cached"
    assert values(again) == values(first)


def test_statistics_of_changed_images_are_made_anew(small, graph, images):
    before = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    np.savez(small / "ref.npz", images["ref"][100:140])
    after = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    assert after.reference_statistics == "computed"
    assert after.fid != before.fid


def test_statistics_by_other_weights_are_made_anew_with_a_warning(small, graph):
    evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    other = small / "other.pb"
    # A graph with one more node is another file with the same features.
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef.FromString(graph.read_bytes())
    definition.node.add(name="unused", op="NoOp")
    other.write_bytes(definition.SerializeToString())
    with pytest.warns(UserWarning, match="made with other tensorflow weights"):
        result = evaluate(small / "ref.npz", small / "sample.npz", weights=other)
    assert result.reference_statistics == "computed"
    assert result.weights_sha256 == sha256_of(other)


def test_damaged_statistics_are_made_anew_with_a_warning(small, graph):
    before = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    cache = cache_path(small / "ref.npz", "tensorflow")
    cache.write_bytes(cache.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="made anew"):
        assert values(evaluate(small / "ref.npz", small / "sample.npz", weights=graph)) == values(before)
    assert NpzFile(cache).load("features").shape == (40, 2048)


def test_a_folder_that_cannot_hold_the_cache_is_no_obstacle(small, graph):
    cache_path(small / "ref.npz", "tensorflow").mkdir()
    with pytest.warns(UserWarning, match="cannot be kept"):
        evaluate(small / "ref.npz", small / "sample.npz", weights=graph)


def test_no_cache_leaves_nothing_behind(small, graph):
    evaluate(small / "ref.npz", small / "sample.npz", weights=graph, use_cache=False)
    assert not cache_path(small / "ref.npz", "tensorflow").exists()


def stored_statistics(extractor, images):
    pool, spatial = extractor.extract(images)
    mu, mu_s = gaussian_of(pool), gaussian_of(spatial)
    return {
        "mu": mu.mean + 0.01,
        "sigma": mu.covariance,
        "mu_s": mu_s.mean - 0.01,
        "sigma_s": mu_s.covariance,
    }


def test_stored_statistics_are_used_as_they_are(small, graph, extractor, images):
    # An ADM reference batch: statistics of another, larger set than its images.
    statistics = stored_statistics(extractor, images["ref"][:80])
    np.savez(small / "adm.npz", arr_0=images["ref"][:40], **statistics)
    adm = evaluate(small / "adm.npz", small / "sample.npz", weights=graph)
    plain = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    pool, spatial = extractor.extract(images["sample"][:30])
    for ours, mean, covariance, features in (
        (adm.fid, "mu", "sigma", pool),
        (adm.sfid, "mu_s", "sigma_s", spatial),
    ):
        expected = frechet_distance(Gaussian(statistics[mean], statistics[covariance]), gaussian_of(features))
        assert ours == pytest.approx(expected, rel=1e-6)
    assert adm.reference_statistics == "stored"
    assert (adm.precision, adm.recall) == (plain.precision, plain.recall)
    # The second time, the images' features come from the cache and the statistics from the file.
    assert values(evaluate(small / "adm.npz", small / "sample.npz", weights=graph)) == values(adm)
    spatial = {name: statistics[name] for name in ("mu_s", "sigma_s")}
    np.savez(small / "half.npz", arr_0=images["ref"][:40], **spatial)
    half = evaluate(small / "half.npz", small / "sample.npz", weights=graph)
    assert (half.fid, half.sfid) == (plain.fid, adm.sfid)


def test_statistics_alone_give_no_precision_and_recall(small, graph, extractor, images):
    np.savez(small / "stats.npz", **stored_statistics(extractor, images["ref"][:80]))
    found = evaluate(small / "stats.npz", small / "sample.npz", weights=graph)
    assert found.fid > 0
    assert found.sfid > 0
    assert (found.precision, found.recall, found.n_reference) == (None, None, None)
    with pytest.raises(UserError, match="need its images"):
        evaluate(small / "stats.npz", small / "sample.npz", weights=graph, kid=True)
    with pytest.raises(UserError, match="no array 'arr_0'"):
        evaluate(small / "stats.npz", small / "sample.npz", backend="digits")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": np.zeros(64)}, r"mu is float64 \[64\], Inception statistics are float \[2048\]"),
        ({"sigma": np.zeros((2048, 2048), dtype=int)}, "sigma is int64"),
        ({"mu": np.full(2048, np.nan)}, "NaN"),
        ({"sigma": -np.eye(2048)}, "semi-definite"),
    ],
)
def test_stored_statistics_that_are_none(small, graph, change, message):
    np.savez(small / "stats.npz", **{"mu": np.zeros(2048), "sigma": np.eye(2048), **change})
    with pytest.raises(UserError, match=message):
        evaluate(small / "stats.npz", small / "sample.npz", weights=graph)


# The command and its records


def test_command_prints_and_records(folder, graph, result, tmp_path):
    done = run(
        folder / "ref.npz", folder / "sample.npz", "--inception", graph, "--output", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == format_result(result) + "\n"
    assert done.stdout.startswith("Inception Score: 2.7510")
    # TensorFlow and its libraries stay quiet: the one warning is ours.
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["WARNING", "WARNING"]
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert {name: record[name] for name in values(result)} == pytest.approx(values(result))
    assert (record["n"], record["n_reference"]) == (500, 600)
    assert record["samples_sha256"] == EXPECTED["images"]["g6_images_sample.npz"]
    assert record["reference_sha256"] == EXPECTED["images"]["g6_images_ref.npz"]
    assert (record["backend"], record["seed"]) == ("tensorflow", 0)
    assert record["weights_sha256"] == sha256_of(graph)
    assert {"python", "numpy", "scipy"} <= set(record["versions"])


def test_a_training_is_judged_as_the_evaluator_judges_files(small, graph, images, monkeypatch, capsys):
    cached = small / "cache/guided-diffusion-tccd" / inception_tensorflow.URL.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(graph)
    monkeypatch.setenv("XDG_CACHE_HOME", str(small / "cache"))
    result = evaluate(small / "ref.npz", small / "sample.npz", weights=graph)
    judge = Judge(small / "ref.npz", Run(eval_samples=30), image_size=32)
    assert judge.metric == "FID-30"
    assert judge.identity["weights_sha256"] == result.weights_sha256
    assert "WARNING: run.eval_samples: 30 images are fewer than the 2048" in capsys.readouterr().err
    scores = judge.score(images["sample"][:30])
    assert scores.pop("fd") == result.fid
    assert scores == {name: value for name, value in values(result).items() if name != "fid"}


def test_few_images_are_warned_of(small, graph):
    with pytest.warns(UserWarning, match="30 images are fewer than the 2048 features"):
        evaluate(small / "ref.npz", small / "sample.npz", weights=graph)


def test_samples_of_another_size_are_scored_with_one_warning_each(small, graph, extractor, images):
    sizes = [(16, 16), (48, 64)]
    for height, width in sizes:
        enlarged = images["sample"][:30].repeat(2, axis=1).repeat(2, axis=2)
        np.savez(small / f"{height}.npz", enlarged[:, :height, :width])
    np.savez(small / "reversed.npz", images["sample"][:30][::-1])
    others = [small / f"{height}.npz" for height, _ in sizes]
    done = run(small / "ref.npz", *others, small / "reversed.npz", "--inception", graph,
               "--output", small / "r.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "images are fewer than" not in line]
    for line, path, (height, width) in zip(told, others, sizes, strict=True):
        assert line.startswith(f"WARNING: {path}: images of {height}x{width}, ")
        assert "32x32" in line
    # As the network itself enlarges them, compared with the reference as it is.
    real = gaussian_of(extractor.extract(images["ref"][:40])[0])
    for path, record in zip(others, json.loads((small / "r.json").read_text()), strict=False):
        features, _ = extractor.extract(NpzFile(path).load("arr_0"))
        assert record["fid"] == pytest.approx(frechet_distance(real, gaussian_of(features)), rel=1e-6)
        assert 0 <= record["precision"] <= 1


def test_mistakes_in_files_are_told_before_a_network_library_is_imported(small):
    code = (
        "import sys\n"
        "from evaluations.evaluator import evaluate\n"
        "from guided_diffusion.errors import UserError\n"
        "try:\n"
        "    evaluate(sys.argv[1], sys.argv[2])\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print({'torch', 'tensorflow'} & set(sys.modules))\n"
    )
    np.savez(small / "float.npz", np.zeros((30, 32, 32, 3)))
    command = [sys.executable, "-c", code, small / "ref.npz", small / "float.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].endswith("images are uint8 0..255")
    assert done.stdout.splitlines()[1] == "set()"


@pytest.mark.parametrize("content", [b"not a graph", b""])
def test_a_file_that_is_no_graph(small, content):
    (small / "bad.pb").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.pb: .*(not a TensorFlow graph|without the nodes ExpandDims)"):
        evaluate(small / "ref.npz", small / "sample.npz", weights=small / "bad.pb")


def test_a_graph_of_another_width(small, graph):
    import tensorflow as tf

    definition = tf.compat.v1.GraphDef.FromString(graph.read_bytes())
    (pool,) = (node for node in definition.node if node.name == "pool_3")
    pool.input[0] = "mixed_8/conv"
    (small / "narrow.pb").write_bytes(definition.SerializeToString())
    with pytest.raises(UserError, match=r"narrow.pb: .*2048 features are expected"):
        evaluate(small / "ref.npz", small / "sample.npz", weights=small / "narrow.pb")


def test_images_are_streamed(images, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images["ref"][:23])
    batches = list(open_images(NpzFile(tmp_path / "x.npz"), at_least=2).batches(10))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(batches), images["ref"][:23])
