"""Metrics as pure functions: golden group g6, brute force, and what each score must mean."""

import numpy as np
import pytest
import torch as th
from golden_data import GOLDEN, manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special
from scipy.spatial.distance import cdist

from evaluations import neighbours
from evaluations.metrics import (
    Gaussian,
    GaussianAccumulator,
    class_entropy,
    covariance_factor,
    frechet_distance,
    gaussian_of,
    inception_score,
    kernel_distance,
)
from evaluations.neighbours import NeighbourScores, nearest_distances, neighbour_scores
from evaluations.results import DigitsScores
from evaluations.scoring import half_sample_intervals
from guided_diffusion.errors import UserError

SETS = ("A", "B_rank_deficient", "C_large_values_float16_overflow")
EXPECTED = manifest("g6_evaluator.json")["arrays"]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "g6_arrays.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def scores_of(reference, samples):
    distances = nearest_distances(reference), nearest_distances(samples)
    return neighbour_scores(reference, samples, *distances, density_coverage=True)


def normal(n, d=8, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((n, d))).astype(np.float32)


# Fréchet distance


@pytest.mark.parametrize("name", SETS)
def test_golden_frechet_distance(golden, name):
    ours = frechet_distance(gaussian_of(golden[f"{name}/ref"]), gaussian_of(golden[f"{name}/sample"]))
    expected = EXPECTED["frechet_and_precision_recall"][name]
    assert ours == pytest.approx(expected["float64_reference"]["frechet_distance"], rel=1e-10)
    assert ours == pytest.approx(expected["frechet_distance"], rel=1e-4)  # sqrtm, as the original


def test_frechet_distance_equals_the_general_square_root():
    a, b = gaussian_of(normal(500, 40, 1) @ normal(40, 40, 2)), gaussian_of(normal(400, 40, 3))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, m", [(30, 50), (200, 30), (2, 90)])
def test_frechet_distance_of_singular_covariances(n, m):
    # Truth from the data themselves: with S = X^T X the trace is the sum of singular values of X Y^T.
    x, y = np.abs(normal(n, 100, 4)).astype(float), normal(m, 100, 5).astype(float) + 0.3
    cx, cy = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    trace = linalg.svdvals(cx @ cy.T).sum()
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.square(cx).sum() + np.square(cy).sum() - 2 * trace
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("decades", [3, 8, 14])  # 14: close to singular
def test_frechet_distance_of_ill_conditioned_covariances(decades):
    # Covariances with common eigenvectors, whose distance is known.
    vectors, _ = np.linalg.qr(normal(200, 200, 1).astype(float))
    x, y = 10 * np.logspace(0, -decades, 200), np.linspace(1, 3, 200) * np.logspace(0, -decades, 200)
    a, b = (Gaussian(np.zeros(200), vectors * values @ vectors.T) for values in (x, y))
    expected = np.square(np.sqrt(x) - np.sqrt(y)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(a, a) < 1e-13 * x.sum()


def test_frechet_distance_survives_statistics_rounded_to_float32():
    x, y = normal(60, 100, 4), normal(70, 100, 5) + 0.3
    exact = frechet_distance(gaussian_of(x), gaussian_of(y))
    rounded = [
        Gaussian(g.mean, g.covariance.astype(np.float32).astype(float))
        for g in (gaussian_of(x), gaussian_of(y))
    ]
    assert frechet_distance(*rounded) == pytest.approx(exact, rel=1e-3)


def test_frechet_distance_is_symmetric_and_zero_for_equal_sets():
    a, b = gaussian_of(normal(300, 20, 1)), gaussian_of(2 * normal(300, 20, 2) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert 0 <= frechet_distance(a, a) < 1e-12


def test_frechet_distance_of_two_points_is_the_squared_distance_of_the_means():
    a, b = (Gaussian(np.full(3, value), np.zeros((3, 3))) for value in (0.0, 2.0))
    assert frechet_distance(a, b) == 12
    wide = Gaussian(np.zeros(3), np.eye(3))
    assert frechet_distance(a, wide) == pytest.approx(3)


def test_frechet_distance_grows_with_added_noise():
    x = normal(1000, 16, 1)
    distances = [
        frechet_distance(gaussian_of(x), gaussian_of(x + normal(1000, 16, 2, scale)))
        for scale in (0, 0.2, 0.5, 1, 2)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 10 * distances[1] > 0


@pytest.mark.parametrize(
    "matrix, message",
    [([[1.0, 2.0], [2.0, 1.0]], "semi-definite"), ([[1.0, np.nan], [np.nan, 1.0]], "NaN")],
)
def test_what_is_no_covariance_is_refused(matrix, message):
    with pytest.raises(UserError, match=message):
        covariance_factor(np.array(matrix))


# Streaming statistics


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 50))
def test_statistics_do_not_depend_on_the_batches(sizes, block):
    x = normal(max(2, sum(sizes)), 5, 9) * np.float32(3) + np.float32(100)
    accumulator = GaussianAccumulator(block)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        accumulator.update(part)
    found = accumulator.result()
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-9)


def test_statistics_keep_their_digits_far_from_zero():
    x = normal(3000, 4, 1).astype(float)
    accumulator = GaussianAccumulator(block=100)
    accumulator.update(x + 1e6)
    np.testing.assert_allclose(accumulator.result().covariance, np.cov(x, rowvar=False), atol=1e-8)


def test_statistics_need_two_rows():
    with pytest.raises(ValueError, match="two rows"):
        gaussian_of(normal(1))


# Inception Score


@pytest.mark.parametrize("split", [5000, 500, 100])
def test_golden_inception_score(golden, split):
    p = special.softmax(golden["inception_score/logits"].astype(float), axis=1).astype(np.float32)
    np.testing.assert_allclose(p[:8], golden["inception_score/probabilities_first_8"], rtol=1e-6)
    expected = EXPECTED["inception_score"][f"split_size_{split}"]
    splits = np.split(p, range(split, len(p), split))
    assert inception_score(splits) == pytest.approx(expected, rel=1e-5)


def test_inception_score_with_a_probability_of_exactly_zero(golden):
    p = special.softmax(golden["inception_score/logits"].astype(float), axis=1)
    p[3] = 0
    p[3, 7] = 1
    almost = p.copy()
    almost[3] = 1e-30
    almost[3, 7] = 1
    assert inception_score([p]) == pytest.approx(inception_score([almost]), rel=1e-12)


def test_inception_score_of_the_extremes():
    assert inception_score([np.eye(10).repeat(3, axis=0)]) == pytest.approx(10)  # sure and balanced
    assert inception_score([np.full((30, 10), 0.1)]) == pytest.approx(1)  # never sure
    assert inception_score([np.eye(10)[np.zeros(30, dtype=int)]]) == pytest.approx(1)  # one class only


def test_class_entropy():
    assert class_entropy(np.full(10, 7)) == pytest.approx(1)
    assert class_entropy(np.array([5, 0, 0])) == 0
    assert class_entropy(np.array([3, 3, 0, 0])) == pytest.approx(0.5)


# Nearest neighbours


def brute_force(reference, samples):
    """The definitions, pair by pair, in float64."""

    def distances(a, b):
        return cdist(a.astype(float), b.astype(float))

    def radii(a, k):
        return np.sort(distances(a, a) + np.diag(np.full(len(a), np.inf)), axis=1)[:, k - 1]

    across = distances(samples, reference)
    in_3, in_5 = across <= radii(reference, 3), across <= radii(reference, 5)
    recalled = (across <= radii(samples, 3)[:, None]).any(0)
    return NeighbourScores(
        in_3.any(1).mean(), recalled.mean(), in_5.sum() / (5 * len(samples)), in_5.any(0).mean()
    )


@pytest.mark.parametrize("name", SETS)
def test_golden_precision_and_recall(golden, name):
    reference, samples = golden[f"{name}/ref"], golden[f"{name}/sample"]
    ours = scores_of(reference, samples)
    expected = EXPECTED["frechet_and_precision_recall"][name]
    assert [ours.precision, ours.recall] == expected["float64_reference"]["precision_recall"]
    # The original decides in float16.
    assert abs(ours.precision - expected["precision"]) <= 3 / len(samples)
    assert abs(ours.recall - expected["recall"]) <= 3 / len(reference)
    assert ours == brute_force(reference, samples)


@pytest.mark.parametrize("name", SETS)
def test_golden_radii(golden, name):
    for side in ("ref", "sample"):
        squared = nearest_distances(golden[f"{name}/{side}"])[:, 2] ** 2
        tolerance = 1e-4 if name.startswith("C") else 1e-2
        np.testing.assert_allclose(squared, golden[f"{name}/radii_{side}"][:, 0], rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(6, 40),
    st.integers(6, 40),
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.sampled_from([1, 1000]),
)
def test_neighbour_scores_equal_brute_force_with_ties_and_duplicates(n, m, dimension, seed, offset):
    generator = np.random.default_rng(seed)
    # Few distinct values: many equal distances, duplicates and radii of 0.
    reference, samples = (
        generator.integers(0, 3, (size, dimension)).astype(np.float32) + offset for size in (n, m)
    )
    assert scores_of(reference, samples) == brute_force(reference, samples)


@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_blocks_make_no_difference(golden, monkeypatch, block):
    reference, samples = golden["B_rank_deficient/ref"], golden["B_rank_deficient/sample"]
    expected = scores_of(reference, samples)
    monkeypatch.setattr(neighbours, "BLOCK", block)
    assert scores_of(reference, samples) == expected


def test_order_makes_no_difference(golden):
    reference, samples = golden["A/ref"], golden["A/sample"]
    assert scores_of(reference[::-1].copy(), samples[::-1].copy()) == scores_of(reference, samples)


def test_identical_sets_have_precision_and_recall_one():
    x = normal(200)
    found = scores_of(x, x)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_a_collapsed_set_is_precise_but_recalls_nothing():
    reference = normal(400, 6, 1)
    collapsed = reference[:1] + normal(200, 6, 2, scale=1e-3)
    found = scores_of(reference, collapsed)
    assert found.precision == 1
    assert found.recall < 0.05
    assert found.coverage < 0.1
    identical = np.repeat(reference[:1], 200, axis=0)
    assert scores_of(reference, identical).recall == 1 / 400  # the one image itself
    assert scores_of(identical, identical).precision == 1


def test_a_distant_set_has_precision_and_recall_zero():
    assert scores_of(normal(100), normal(100, seed=1) + 50) == NeighbourScores(0, 0, 0, 0)


def test_a_spread_out_set_recalls_but_is_not_precise():
    found = scores_of(normal(300, 6, 1), normal(300, 6, 2, scale=4))
    assert found.recall > 0.9
    assert found.precision < 0.5


PRECISIONS = (th.float32, th.float64)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRECISIONS), st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 50.0])
)
def test_squared_distances_stay_within_their_rounding(dtype, dimension, seed, offset):
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((30, dimension)) ** 3 + offset).astype(np.float32)
    points = neighbours.Points(x, x[0], th.device("cpu"))
    found = neighbours.squared_distances(points, slice(None), points, slice(None), dtype)
    exact = np.square(x[:, None].astype(float) - x[None]).sum(-1)
    bound = neighbours.rounding(dtype, dimension) * (points.norms[:, None] + points.norms)
    assert (abs(found.numpy() - exact) <= bound.numpy() + 1e-300).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_coarse_precision_does_not_change_a_decision(monkeypatch, dtype, spread):
    # Tight clusters far from the common centre: products in float32 cannot tell their members apart.
    monkeypatch.setattr(neighbours, "BLOCK", 50)
    monkeypatch.setattr(neighbours, "coarse_precision", lambda: dtype)
    generator = np.random.default_rng(0)
    clusters = 5 * generator.standard_normal((6, 12))
    reference, samples = (
        (clusters[generator.integers(6, size=n)] + spread * generator.standard_normal((n, 12))).astype(
            np.float32
        )
        for n in (170, 130)
    )
    assert scores_of(reference, samples) == brute_force(reference, samples)
    pairs = np.sqrt(np.square(reference[:, None].astype(float) - reference[None]).sum(-1))
    expected = np.sort(pairs + np.diag(np.full(170, np.inf)), axis=1)[:, :5]
    np.testing.assert_allclose(nearest_distances(reference), expected, rtol=1e-12)


def test_float32_products_of_lower_precision_are_not_trusted():
    before = th.get_float32_matmul_precision()
    try:
        assert neighbours.coarse_precision() == th.float32
        th.set_float32_matmul_precision("medium")
        assert neighbours.coarse_precision() == th.float64
    finally:
        th.set_float32_matmul_precision(before)


def test_nearest_distances_need_more_points_than_neighbours():
    with pytest.raises(ValueError, match="5 features"):
        nearest_distances(normal(5), k=5)


# Kernel distance


def test_kernel_distance_equals_its_definition():
    a, b = normal(12, 3, 1).astype(float), normal(12, 3, 2).astype(float) + 1
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in pairs if i != j) / (12 * 11)
    across = sum(kernel(a[i], b[j]) for i, j in pairs) / 144
    assert kernel_distance(a, b, seed=0, subsets=2) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased_and_grows_with_the_difference():
    fresh = [kernel_distance(normal(50, 4, s), normal(50, 4, s + 100), seed=0, subsets=1) for s in range(60)]
    assert abs(np.mean(fresh)) < 3 * np.std(fresh) / np.sqrt(60)
    apart = [kernel_distance(normal(200, 4, 1), normal(200, 4, 2) + shift, seed=0) for shift in (0.2, 0.5, 1)]
    assert np.mean(fresh) + 3 * np.std(fresh) / np.sqrt(60) < apart[0] < apart[1] < apart[2]


def test_kernel_distance_depends_on_its_seed_alone():
    a, b = normal(80, 4, 1), normal(90, 4, 2)
    first = kernel_distance(a, b, seed=3, subsets=4, subset_size=20)
    assert first == kernel_distance(a, b, seed=3, subsets=4, subset_size=20)
    assert first != kernel_distance(a, b, seed=4, subsets=4, subset_size=20)


# Intervals


def test_intervals_have_the_width_of_a_mean_of_n():
    # For a mean the answer is known: 1.96 standard deviations of one value, over sqrt(n).
    x = np.random.default_rng(0).uniform(0.4, 0.6, 900)

    def score(rows):
        return DigitsScores(0.0, float(x[rows].mean()), 0.5, 0.0, ())

    centre = score(slice(None))
    intervals = half_sample_intervals(score, centre, 900, 400, seed=0)
    low, high = intervals["confidence"]
    assert (low + high) / 2 == pytest.approx(centre.confidence)
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 30, rel=0.15)
    assert intervals["noise_share"] == (0, 0)
    assert intervals == half_sample_intervals(score, centre, 900, 400, seed=0)


def test_intervals_of_a_frechet_distance_match_its_spread_over_fresh_samples():
    reference = gaussian_of(normal(4000, 8, 1))

    def distance(x):
        return frechet_distance(reference, gaussian_of(x))

    fresh = [distance(0.8 * normal(400, 8, seed) + 0.3) for seed in range(10, 110)]
    x = 0.8 * normal(400, 8, 5) + 0.3
    low, high = half_sample_intervals(
        lambda rows: DigitsScores(distance(x[rows]), 0.0, 0.0, 0.0, ()),
        DigitsScores(distance(x), 0.0, 0.0, 0.0, ()),
        400,
        100,
        seed=0,
    )["fd"]
    assert (high - low) / 2 / 1.96 == pytest.approx(np.std(fresh), rel=0.35)
