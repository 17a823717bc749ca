"""Scores that look at nearest neighbours: improved precision and recall, density and coverage.

Distances are Euclidean and computed a block at a time; N x N of them are never held. Every decision
is that of float64 distances, whatever the blocks: see `distances`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .distances import BLOCK, Points, precisions, products, rounding, starts
from .progress import tracked

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
NEIGHBOURS = 5  # the most that any score here looks at

_SPARE = 15  # more candidates than neighbours, since a coarse product may swap some
_EXACT_PAIRS = 64


@dataclass(frozen=True)
class NeighbourScores:
    """Each in 0..1 but density, which can exceed 1; density and coverage None if not asked for."""

    precision: float
    recall: float
    density: float | None
    coverage: float | None


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
    found = np.empty((n, k))
    rows = np.arange(n)
    for dtype in precisions(points.device):
        candidates = _Candidates(points, rows, min(k + _SPARE, n - 1), dtype)
        found[rows], sure = candidates.distances(k)
        rows = rows[~sure]
        if len(rows) == 0:
            break
    return found


class _Candidates:
    """For some of the points, the others that look nearest in one precision."""

    def __init__(self, points: Points, rows: np.ndarray, wanted: int, dtype: torch.dtype) -> None:
        self._points, self._rows, self._dtype = points, rows, dtype
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        self._norms = points.norms.to(kind)
        self._squared = torch.full((len(rows), wanted), torch.inf, dtype=kind, device=points.device)
        self._index = torch.zeros((len(rows), wanted), dtype=torch.int64, device=points.device)
        everything = np.arange(len(points))
        whole = len(rows) == len(points)
        for i in tracked(starts(len(rows)), "nearest neighbours", "blocks"):
            mine = rows[i : i + BLOCK]
            block = points.take(mine, dtype)
            # Of all points with all points, one product serves both blocks.
            for j in starts(i + 1 if whole else len(points)):
                others = everything[j : j + BLOCK]
                d = self._distances(mine, block, others, dtype)
                self._keep(i, d, j)
                if whole and j < i:
                    self._keep(j, d.T, i)

    def _distances(
        self, mine: np.ndarray, block: torch.Tensor, others: np.ndarray, dtype: torch.dtype
    ) -> torch.Tensor:
        norms = self._norms[mine][:, None], self._norms[others]
        d = products(block, self._points.take(others, dtype)).mul_(-2).add_(norms[0]).add_(norms[1])
        same = np.nonzero((mine >= others[0]) & (mine <= others[-1]))[0]
        d[same, mine[same] - others[0]] = torch.inf
        return d

    def _keep(self, start: int, d: torch.Tensor, first_column: int) -> None:
        place = slice(start, start + len(d))
        near, where = d.topk(min(self._index.shape[1], d.shape[1]), dim=1, largest=False)
        both = torch.cat([self._squared[place], near], 1)
        both_index = torch.cat([self._index[place], where + first_column], 1)
        self._squared[place], order = both.topk(self._index.shape[1], dim=1, largest=False)
        self._index[place] = both_index.gather(1, order)

    def distances(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact distances to the k nearest candidates, float64 [n, k], and whether they are the k nearest."""
        points = self._points
        error = rounding(self._dtype, points.raw.shape[1]) * (points.norms[self._rows] + points.norms.max())
        plausible = self._squared <= (self._squared[:, k - 1] + 2 * error)[:, None]
        i, column = (index.cpu().numpy() for index in plausible.nonzero(as_tuple=True))
        others = self._index.cpu().numpy()
        exact = np.full(others.shape, np.inf)
        exact[i, column] = _squared_distances(points.raw, self._rows[i], others[i, column])
        exact = np.sort(exact, axis=1)[:, :k]
        # Whoever is no candidate looked at least as far away as the last one did.
        beyond = (self._squared[:, -1] - error).cpu().numpy()
        settled = self._dtype == torch.float64 or others.shape[1] == len(points) - 1
        return np.sqrt(exact), (exact[:, -1] <= np.maximum(beyond, 0)) | settled


def _squared_distances(raw: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances float64 [P] of the pairs (raw[i], raw[j]), from their differences."""
    out = np.empty(len(i))
    for start in range(0, len(i), _EXACT_PAIRS):  # few at a time: they stay in the processor's cache
        part = slice(start, start + _EXACT_PAIRS)
        difference = raw[i[part]].astype(np.float64)
        difference -= raw[j[part]]
        out[part] = np.einsum("pd,pd->p", difference, difference)
    return out


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
    precise = np.zeros(len(fake), dtype=bool)
    recalled, covered = np.zeros((2, len(real)), dtype=bool)
    memberships = 0
    dtype = precisions(device)[0]
    for i in tracked(starts(len(fake)), "precision and recall", "blocks"):
        rows = np.arange(i, min(i + BLOCK, len(fake)))
        block = fake.take(rows, dtype)
        for j in starts(len(real)):
            columns = np.arange(j, min(j + BLOCK, len(real)))
            product = products(block, real.take(columns, dtype))
            precise[rows] |= real_balls.reach(fake, rows, columns, product, ~precise[rows])
            recalled[columns] |= fake_balls.reach(real, columns, rows, product.T, ~recalled[columns])
            if density_coverage:
                inside = wide_balls.inside(fake, rows, columns)
                memberships += int(inside.sum())
                covered[columns] |= inside.any(axis=0)
    return NeighbourScores(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=memberships / (DENSITY_COVERAGE_K * len(fake)) if density_coverage else None,
        coverage=float(covered.mean()) if density_coverage else None,
    )


class _Balls:
    """Balls around points. A point p lies in that of c if p.c - (|c|^2 - r^2) / 2 >= |p|^2 / 2."""

    def __init__(self, centres: Points, radii: np.ndarray) -> None:
        self._centres = centres
        self._levels = precisions(centres.device)
        self._offsets = (centres.norms - torch.from_numpy(radii).to(centres.norms).square()) / 2

    def reach(
        self,
        points: Points,
        rows: np.ndarray,
        columns: np.ndarray,
        product: torch.Tensor,
        asked: np.ndarray,
        level: int = 0,
    ) -> np.ndarray:
        """Which points lie in the ball of at least one of some centres.

        Args:
            points: the points.
            rows: which of them, indices [n].
            columns: which centres, indices [m].
            product: `products` of the two in the precision of `level`, [n, m].
            asked: bool [n], the rows that matter; the others get False.
            level: index into `precisions`.
        """
        kind = product.dtype
        margin = (product - self._offsets[columns].to(kind)).amax(1) - points.norms[rows].to(kind) / 2
        error = self._error(points, rows, columns, level).to(kind)
        if level == len(self._levels) - 1:
            return (margin >= -error).cpu().numpy() & asked
        hit = (margin > error).cpu().numpy() & asked
        undecided = np.nonzero((margin >= -error).cpu().numpy() & asked & ~hit)[0]
        if len(undecided):
            finer = self._levels[level + 1]
            few = rows[undecided]
            product = products(points.take(few, finer), self._centres.take(columns, finer))
            hit[undecided] = self.reach(
                points, few, columns, product, np.ones(len(few), dtype=bool), level + 1
            )
        return hit

    def inside(self, points: Points, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Which of the points [n] lie in which of the balls [m]; bool [n, m], by float64 products."""
        product = products(points.take(rows, torch.float64), self._centres.take(columns, torch.float64))
        margin = product - self._offsets[columns] - points.norms[rows][:, None] / 2
        error = self._error(points, rows, columns, len(self._levels) - 1)
        return (margin >= -error[:, None]).cpu().numpy()

    def _error(self, points: Points, rows: np.ndarray, columns: np.ndarray, level: int) -> torch.Tensor:
        largest = points.norms[rows] + self._centres.norms[columns].max()
        return rounding(self._levels[level], points.raw.shape[1]) * largest / 2
