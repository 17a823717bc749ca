"""From features to scores: which metrics a backend's features get, and how sure they are."""

from collections.abc import Callable

import numpy as np

from guided_diffusion.io.image_sets import Images

from .digits import is_noise
from .features import Extractor, FeatureSet, choose_device, extract_features
from .metrics import (
    SPLIT_SIZE,
    class_entropy,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from .neighbours import PRECISION_RECALL_K, nearest_distances, neighbour_scores
from .reference import Reference
from .results import SCORES, DigitsScores, InceptionScores, Scores, values
from .settings import Settings


def score_samples(
    images: Images, reference: Reference, extractor: Extractor, settings: Settings
) -> tuple[Scores, dict[str, tuple[float, float]]]:
    """Scores of one sample file and, if the settings ask for them, their intervals."""
    samples = extract_features(extractor, images, settings.batch_size, keep_spatial=settings.intervals > 0)
    rough = noise_of(images, settings)
    scores = score_set(reference, samples, rough, extractor, settings)
    if not settings.intervals:
        return scores, {}
    return scores, half_sample_intervals(
        lambda rows: score_set(
            reference, samples.subset(rows), rough[rows] if len(rough) else rough, extractor, settings
        ),
        scores,
        images.count,
        settings.intervals,
        settings.seed,
    )


def noise_of(images: Images, settings: Settings) -> np.ndarray:
    """Which images count as noise, bool [N]; empty where no score asks."""
    if settings.backend != "digits":
        return np.zeros(0, dtype=bool)
    return np.concatenate([is_noise(batch) for batch in images.batches(settings.batch_size)])


def score_set(
    reference: Reference, samples: FeatureSet, noise: np.ndarray, extractor: Extractor, settings: Settings
) -> Scores:
    """The scores of the settings' backend, of some features and what `noise_of` says of their images."""
    if settings.backend == "digits":
        return score_digits(reference, samples, extractor.probabilities(samples.features), noise)
    return score_inception(reference, samples, extractor, settings)


def score_inception(
    reference: Reference, samples: FeatureSet, extractor: Extractor, settings: Settings
) -> InceptionScores:
    """The scores of the Inception backends.

    Args:
        reference: with or without features; without them the scores that need them stay None.
        samples: features of the generated images, in the order of generation.
        extractor: gives class probabilities of features.
        settings: which scores; the seed of the kernel distance's subsets; the neighbours' device.
    """
    features = samples.features
    splits = (features[i : i + SPLIT_SIZE] for i in range(0, len(features), SPLIT_SIZE))
    found: dict[str, float | None] = {"sfid": None, "precision": None, "recall": None}
    if reference.spatial_gaussian is not None and samples.spatial_gaussian is not None:
        found["sfid"] = frechet_distance(reference.spatial_gaussian, samples.spatial_gaussian)
    found |= _neighbour_scores(reference, samples, settings.device, settings.density_coverage)
    if settings.kid and reference.features is not None:
        found["kid"] = kernel_distance(reference.features, features, seed=settings.seed)
    return InceptionScores(
        inception_score=inception_score(extractor.probabilities(split) for split in splits),
        fid=frechet_distance(reference.gaussian, samples.gaussian),
        **found,
    )


def score_digits(
    reference: Reference, samples: FeatureSet, probabilities: np.ndarray, noise: np.ndarray
) -> DigitsScores:
    """The scores of the digits backend.

    Args:
        reference: of the real digits' features, 64-d; without features precision and recall stay None.
        samples: features of the generated images.
        probabilities: float32 [N, 10], the classifier's.
        noise: bool [N], which images count as noise.
    """
    histogram = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1])
    return DigitsScores(
        fd=frechet_distance(reference.gaussian, samples.gaussian),
        confidence=float(probabilities.max(axis=1).mean(dtype=np.float64)),
        class_balance=class_entropy(histogram),
        noise_share=float(noise.mean()),
        histogram=tuple(int(count) for count in histogram),
        **_neighbour_scores(reference, samples, "cpu"),
    )


def _neighbour_scores(
    reference: Reference, samples: FeatureSet, device: str | None, density_coverage: bool = False
) -> dict[str, float]:
    """Precision and recall by name, density and coverage if asked for; nothing without reference features."""
    if reference.features is None or reference.neighbours is None:
        return {}
    chosen = choose_device(device)
    near = neighbour_scores(
        reference.features,
        samples.features,
        reference.neighbours,
        nearest_distances(samples.features, PRECISION_RECALL_K, chosen),
        density_coverage=density_coverage,
        device=chosen,
    )
    return {name: value for name, value in vars(near).items() if value is not None}


def half_sample_intervals(
    score: Callable[[np.ndarray], Scores], centre: Scores, n: int, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % confidence intervals of the scores for the finite number of samples, at that number.

    Each replicate scores a random half of the samples, drawn without replacement. The spread of a
    mean over such halves equals the spread of the mean of all n over fresh samples (the delete-half
    jackknife; Shao & Wu 1989), and so it does, to first order, for the scores. Resampling with
    replacement would not do: duplicated images have neighbours at distance 0, which upsets
    precision, recall and KID. The interval is the score +- 1.96 standard deviations; the reference
    counts as fixed, the bias that Fréchet distances have at small n is part of the score, and no
    interval leaves the range of its score.

    Args:
        score: gives the scores of some rows (sorted int64 indices).
        centre: the scores of all rows.
        n: number of rows, at least twice what `score` needs.
        replicates: at least 2.
        seed: of the halves.
    """
    generator = np.random.default_rng(seed)
    draws = [values(score(np.sort(generator.choice(n, n // 2, replace=False)))) for _ in range(replicates)]
    intervals = {}
    for name, value in values(centre).items():
        margin = 1.96 * float(np.std([draw[name] for draw in draws], ddof=1))
        _, lowest, highest = SCORES[name]
        intervals[name] = (max(lowest, value - margin), min(highest, value + margin))
    return intervals
