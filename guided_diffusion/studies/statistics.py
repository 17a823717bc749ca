"""The statistics of paired comparisons: what may be said after a few seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two runs that share their seeds.

    Attributes:
        n: pairs.
        mean: of the differences.
        low, high: 95 % interval of the mean by Student's t; infinite for one pair.
        p: `sign_flip_p` of the differences.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """Compare pairs.

    Args:
        differences: one of each pair, at least one, finite.
    """
    from scipy.stats import t

    values = np.asarray(differences, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    margin = math.inf
    if n > 1:
        margin = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return PairedDifference(n, mean, mean - margin, mean + margin, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p of "each difference might as well have the other sign".

    The share of all 2^n signs (Fisher's randomisation test) whose sum is at least as far from 0 as the one
    that was found. It cannot be below 2^(1-n): with three pairs 0.25, with six 0.03125.

    Args:
        differences: n of them, not more than some twenty.
    """
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    rounding = 1e-12 * float(np.abs(differences).sum())
    return float((np.abs(sums) >= abs(sum(differences)) - rounding).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, 1979), in the order given.

    Rejecting those below alpha keeps the probability of any false rejection among them below alpha.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
