"""Scores that look at nearest neighbours: improved precision and recall, density and coverage.

Squared distances are |a|^2 + |b|^2 - 2 a.b, a block at a time; N x N of them are never held. Products
in float32 settle almost every question; whatever their rounding leaves open is asked again in float64,
so that every decision is that of float64 distances. Those that differ by less count as equal.
"""

from dataclasses import dataclass

import numpy as np
import torch

from guided_diffusion.io.progress import tracked

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
NEIGHBOURS = 5  # the most that any score here looks at

BLOCK = 2048
_SPARE = 5  # more candidates than neighbours, since rounding may swap some
_EXACT_ROWS, _FLOAT64_ROWS = 8, 256  # at a time, to stay in the processor's cache and in little memory


@dataclass(frozen=True)
class NeighbourScores:
    """Each in 0..1 but density, which can exceed 1; density and coverage None if not asked for."""

    precision: float
    recall: float
    density: float | None
    coverage: float | None


class Points:
    """Features float32 [N, D], moved to a common centre: the distances stay, rounding gets small.

    Args:
        raw: the features; not copied.
        centre: [D]; rounded to float32.
        device: where products are computed.

    Attributes:
        norms: float64 [N], the squares of the lengths.
    """

    def __init__(self, raw: np.ndarray, centre: np.ndarray, device: torch.device) -> None:
        self.raw = raw
        self.device = device
        self._centre = torch.from_numpy(centre.astype(np.float32)).to(device)
        blocks = (self.take(rows, torch.float64) for rows in blocks_of(len(raw)))
        self.norms = torch.cat([torch.linalg.vecdot(block, block) for block in blocks])

    def take(self, rows: slice | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Some of the points, centred; [n, D]."""
        return torch.from_numpy(self.raw[rows]).to(self.device, dtype) - self._centre.to(dtype)


def blocks_of(n: int) -> list[slice]:
    """The rows of n, in blocks."""
    return [slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]


def coarse_precision() -> torch.dtype:
    """float32, unless torch has been told to multiply it in less (`torch.set_float32_matmul_precision`)."""
    return torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64


def squared_distances(
    a: Points, rows: slice | np.ndarray, b: Points, columns: slice | np.ndarray, dtype: torch.dtype
) -> torch.Tensor:
    """Squared distances [n, m] by one product in a precision; off by `rounding` at most."""
    d = torch.mm(a.take(rows, dtype), b.take(columns, dtype).T).mul_(-2)
    return d.add_(a.norms[rows].to(dtype)[:, None]).add_(b.norms[columns].to(dtype))


def rounding(dtype: torch.dtype, dimension: int) -> float:
    """Bound on the error of `squared_distances`, relative to |a|^2 + |b|^2.

    Sums of D terms are off by the order of sqrt(D) units in the last place (Higham & Mary 2019).
    """
    return (8 + dimension**0.5) * torch.finfo(dtype).eps


def nearest_distances(
    features: np.ndarray, k: int = NEIGHBOURS, device: torch.device | None = None
) -> np.ndarray:
    """Distances of each feature to its k nearest others; a duplicate is another, at distance 0.

    Args:
        features: float32 [N, D], N greater than k.
        k: number of neighbours.
        device: where to compute; None for the CPU.

    Returns:
        float64 [N, k], ascending.

    Raises:
        ValueError: not more than k features.
    """
    n = len(features)
    if n <= k:
        raise ValueError(f"{n} features have no {k} nearest others")
    points = Points(features, features.mean(axis=0, dtype=np.float64), device or torch.device("cpu"))
    dtype = coarse_precision()
    # Of every point the candidates: those that look nearest, and how far away they look.
    looks = torch.full((n, min(k + _SPARE, n - 1)), torch.inf, dtype=dtype, device=points.device)
    index = torch.zeros(looks.shape, dtype=torch.int64, device=points.device)

    def keep(rows: slice, d: torch.Tensor, columns: slice) -> None:
        near, where = d.topk(min(looks.shape[1], d.shape[1]), dim=1, largest=False)
        both_index = torch.cat([index[rows], where + columns.start], 1)
        looks[rows], order = torch.cat([looks[rows], near], 1).topk(looks.shape[1], dim=1, largest=False)
        index[rows] = both_index.gather(1, order)

    for number, rows in enumerate(tracked(blocks_of(n), "nearest neighbours", "blocks")):
        for columns in blocks_of(n)[: number + 1]:
            d = squared_distances(points, rows, points, columns, dtype)
            if columns == rows:
                d.fill_diagonal_(torch.inf)
            else:  # one product serves both blocks
                keep(columns, d.T, rows)
            keep(rows, d, columns)
    others = index.cpu().numpy()
    found = _exact_distances(features, np.arange(n), others)
    # Whoever is no candidate looked at least as far away as the last candidate did.
    error = rounding(dtype, features.shape[1]) * (points.norms + points.norms.max())
    unsure = np.nonzero(found[:, k - 1] ** 2 > (looks[:, -1] - error).cpu().numpy())[0]
    for i in range(0, len(unsure), _FLOAT64_ROWS):
        few = unsure[i : i + _FLOAT64_ROWS]
        parts = [squared_distances(points, few, points, part, torch.float64) for part in blocks_of(n)]
        d = torch.cat(parts, 1)
        d[np.arange(len(few)), few] = torch.inf
        others = d.topk(looks.shape[1], dim=1, largest=False).indices.cpu().numpy()
        found[few] = _exact_distances(features, few, others)
    return found[:, :k]


def _exact_distances(features: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances of rows [n] to others [n, c], float64 [n, c], ascending, from their differences."""
    squared = np.empty(others.shape)
    for i in range(0, len(rows), _EXACT_ROWS):
        part = slice(i, i + _EXACT_ROWS)
        difference = features[others[part]].astype(np.float64)
        difference -= features[rows[part], None]
        squared[part] = np.einsum("ncd,ncd->nc", difference, difference)
    return np.sort(np.sqrt(squared), axis=1)


def neighbour_scores(
    reference: np.ndarray,
    samples: np.ndarray,
    reference_distances: np.ndarray,
    sample_distances: np.ndarray,
    *,
    density_coverage: bool = False,
    device: torch.device | None = None,
) -> NeighbourScores:
    """Improved precision and recall (k = 3), density and coverage (k = 5).

    Precision: share of samples that lie within the distance of some reference image to its k-th
    neighbour; recall the same with the roles exchanged (Kynkäänniemi et al. 2019, eq. 1-2). Density:
    mean number of such reference balls around a sample, over k; coverage: share of reference balls
    that hold a sample (Naeem et al. 2020, eq. 3-4).

    Args:
        reference: float32 [M, D].
        samples: float32 [N, D].
        reference_distances: [M, 5 or more], `nearest_distances` of the reference.
        sample_distances: [N, 3 or more], those of the samples.
        density_coverage: also density and coverage.
        device: where to compute; None for the CPU.
    """
    device = device or torch.device("cpu")
    centre = reference.mean(axis=0, dtype=np.float64)
    real, fake = Points(reference, centre, device), Points(samples, centre, device)
    real_balls = _Balls(real, reference_distances[:, PRECISION_RECALL_K - 1])
    fake_balls = _Balls(fake, sample_distances[:, PRECISION_RECALL_K - 1])
    wide_balls = _Balls(real, reference_distances[:, DENSITY_COVERAGE_K - 1])
    precise = np.zeros(len(samples), dtype=bool)
    recalled, covered = np.zeros((2, len(reference)), dtype=bool)
    memberships = 0
    dtype = coarse_precision()
    for rows in tracked(blocks_of(len(samples)), "precision and recall", "blocks"):
        for columns in blocks_of(len(reference)):
            d = squared_distances(fake, rows, real, columns, dtype)
            precise[rows] |= real_balls.reach(fake, rows, columns, d)
            recalled[columns] |= fake_balls.reach(real, columns, rows, d.T)
            if density_coverage:
                inside = wide_balls.hold(fake, rows, columns)
                memberships += int(inside.sum())
                covered[columns] |= inside.any(axis=0)
    return NeighbourScores(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=memberships / (DENSITY_COVERAGE_K * len(samples)) if density_coverage else None,
        coverage=float(covered.mean()) if density_coverage else None,
    )


class _Balls:
    """Balls around points; a ball holds what is no farther from its centre than its radius."""

    def __init__(self, centres: Points, radii: np.ndarray) -> None:
        self._centres = centres
        self._squared_radii = torch.from_numpy(radii).to(centres.norms).square()

    def reach(self, points: Points, rows: slice, columns: slice, d: torch.Tensor) -> np.ndarray:
        """Which of the points lie in at least one of the balls; bool [n], of `squared_distances` [n, m]."""
        margin = (self._squared_radii[columns].to(d.dtype) - d).amax(1)
        error = self._error(points, rows, columns, d.dtype)
        hit = (margin > error).cpu().numpy()
        unclear = np.nonzero((margin.abs() <= error).cpu().numpy())[0]
        if len(unclear):
            hit[unclear] = self.hold(points, rows.start + unclear, columns).any(axis=1)
        return hit

    def hold(self, points: Points, rows: slice | np.ndarray, columns: slice) -> np.ndarray:
        """Which of the points lie in which of the balls; bool [n, m], by products in float64."""
        d = squared_distances(points, rows, self._centres, columns, torch.float64)
        error = self._error(points, rows, columns, torch.float64)
        return (self._squared_radii[columns] - d >= -error[:, None]).cpu().numpy()

    def _error(
        self, points: Points, rows: slice | np.ndarray, columns: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        largest = points.norms[rows] + self._centres.norms[columns].max()
        return rounding(dtype, points.raw.shape[1]) * largest
