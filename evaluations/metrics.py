"""Scores of generated images as pure functions of their features.

Nothing here knows of files, networks or images. Sums run in float64; features come as float32 or
float64 [N, D], one row per image. The nearest-neighbour scores are in `neighbours.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import linalg, special

from guided_diffusion.errors import UserError

SPLIT_SIZE = 5000  # of the Inception Score in the ADM suite


def covariance_factor(covariance: np.ndarray) -> np.ndarray:
    """L with L L^T = covariance, by Cholesky decomposition.

    Singular covariances (fewer images than features) are decomposed with diagonal pivoting, which
    stops where what is left is rounding noise: L then has `rank` columns.

    Args:
        covariance: float64 [D, D], symmetric and positive semi-definite up to rounding.

    Returns:
        float64 [D, D], lower triangular, of a regular covariance; else [D, rank].

    Raises:
        UserError: not finite, or no covariance matrix.
    """
    if not np.isfinite(covariance).all():
        raise UserError("a covariance matrix holds NaN or infinity")
    diagonal = np.diagonal(covariance)
    factor, failed = linalg.lapack.dpotrf(covariance, lower=1)
    noise = len(covariance) * np.finfo(float).eps * diagonal.max()  # dpstrf's tolerance
    if not failed and np.diagonal(factor).min() ** 2 > noise:
        return factor
    packed, pivots, rank, _ = linalg.lapack.dpstrf(covariance, lower=1)
    factor = np.zeros((len(covariance), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    if np.abs(np.square(factor).sum(axis=1) - diagonal).max() > 1e-3 * np.abs(diagonal).max():
        raise UserError("a stored covariance matrix is not positive semi-definite")
    return factor


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of a set of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @cached_property
    def factor(self) -> np.ndarray:
        """`covariance_factor` of the covariance, computed once."""
        return covariance_factor(self.covariance)


class GaussianAccumulator:
    """Mean and covariance of features that arrive in batches, in float64 and O(D^2) memory.

    Blocks of `block` rows are merged by the pairwise update of Chan, Golub & LeVeque (1983), which
    loses no digits when the mean is large against the spread. How the rows are divided into
    batches makes no difference.
    """

    def __init__(self, block: int = 1024) -> None:
        self.block = block
        self.count = 0
        self._mean: np.ndarray | float = 0.0
        self._scatter: np.ndarray | float = 0.0
        self._waiting: list[np.ndarray] = []

    def update(self, features: np.ndarray) -> None:
        """Add features [N, D]."""
        for start in range(0, len(features), self.block):
            self._waiting.append(np.array(features[start : start + self.block], dtype=np.float64))
            if sum(map(len, self._waiting)) >= self.block:
                rows = np.concatenate(self._waiting)
                self._merge(rows[: self.block])
                self._waiting = [rows[self.block :]]

    def _merge(self, rows: np.ndarray) -> None:
        mean = rows.mean(axis=0)
        centred = rows - mean
        total = self.count + len(rows)
        step = mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter += np.outer(step, step) * (self.count * len(rows) / total)
        self._mean += step * (len(rows) / total)
        self.count = total

    def result(self) -> Gaussian:
        """Statistics of everything seen; nothing can be added afterwards.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        rows = np.concatenate(self._waiting) if self._waiting else np.empty((0, 0))
        self._waiting = []
        if len(rows):
            self._merge(rows)
        if self.count < 2:
            raise ValueError("a covariance needs at least two rows")
        return Gaussian(np.asarray(self._mean), np.asarray(self._scatter) / (self.count - 1))


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance of features [N, D], N at least 2."""
    accumulator = GaussianAccumulator()
    accumulator.update(features)
    return accumulator.result()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6).

    |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), without a general matrix square root.

    Returns:
        at least 0; two equal Gaussians give 0 up to rounding (about 1e-14 of the traces).
    """
    shift = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(shift @ shift + traces - 2 * _overlap(a, b)), 0.0)


def _overlap(a: Gaussian, b: Gaussian) -> float:
    """tr((S_a S_b)^(1/2)); with S = L L^T the sum of the singular values of L_a^T L_b.

    Their squares are the eigenvalues of L_a^T S_b L_a, which take a third of the time. A root doubles
    an eigenvalue's error, so that is for regular covariances; of singular ones, where the noise in
    many eigenvalues near 0 would add up, the singular values themselves are taken.
    """
    if a.factor.shape[1] == b.factor.shape[1] == len(a.mean):
        product, _ = linalg.lapack.dsygst(b.covariance, a.factor, itype=2, lower=1)
        squares = linalg.eigvalsh(product, lower=True, driver="ev", overwrite_a=True, check_finite=False)
        return float(np.sqrt(squares.clip(min=0)).sum())
    return float(linalg.svdvals(a.factor.T @ b.factor).sum())


def inception_score(splits: Iterable[np.ndarray]) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over splits (Salimans et al. 2016, sec. 4).

    All splits count alike, also a last and shorter one, as in the ADM suite. A probability of
    exactly 0 contributes 0, its limit.

    Args:
        splits: class probabilities [n_i, classes], rows summing to 1; one split in memory at a time.
    """
    scores = []
    for split in splits:
        p = np.asarray(split, dtype=np.float64)
        marginal = p.mean(axis=0)
        # sum_x sum_y p log p - p log p(y), both with 0 log 0 = 0
        divergence = special.xlogy(p, p).sum(axis=1).mean() - special.xlogy(marginal, marginal).sum()
        scores.append(np.exp(divergence))
    return float(np.mean(scores))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, seed: int, subsets: int = 100, subset_size: int = 1000
) -> float:
    """Kernel Inception distance: unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Mean over random subsets, each drawn without replacement (Binkowski et al. 2018, sec. 4). It
    can be a little below 0.

    Args:
        a: features [N, D].
        b: features [M, D].
        seed: of the subsets.
        subsets: how many.
        subset_size: rows drawn from either side; all of the smaller side if it has fewer.

    Raises:
        ValueError: fewer than two rows on a side.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs at least two rows on either side")
    generator = np.random.default_rng(seed)
    total = 0.0
    for _ in range(subsets):
        x = a[generator.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[generator.choice(len(b), size, replace=False)].astype(np.float64)
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        total += within / (size * (size - 1)) - 2 * xy.mean()
    return float(total / subsets)


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def class_entropy(histogram: np.ndarray) -> float:
    """Entropy of a class histogram [classes] over the entropy of equal classes: 0 (one class) to 1."""
    share = np.asarray(histogram, dtype=np.float64) / np.sum(histogram)
    return float(special.entr(share).sum() / np.log(len(share)))
