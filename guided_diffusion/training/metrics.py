"""Means of what a run logs, gathered without waiting for the device."""

from collections.abc import Mapping

import torch as th

from .. import dist_util
from .objective import PassLoss


class Metrics:
    """Means of logged quantities since the last reading, summed on the device without waiting for it."""

    def __init__(self) -> None:
        self.sums: dict[str, th.Tensor] = {}

    def add(self, name: str, values: th.Tensor) -> None:
        """Take in values [B], or one value []."""
        values = values.detach().float()
        pair = th.stack([values.sum(), th.full((), values.numel(), device=values.device)])
        self._add_pair(name, pair)

    def add_pass(self, out: PassLoss, num_timesteps: int) -> None:
        """Take in the terms of a pass, also by quartile of t: q0 are the cleanest steps."""
        for part in out.parts:
            self.add_pass(part, num_timesteps)
        quartile = th.nn.functional.one_hot(4 * out.t // num_timesteps, 4)  # [B, 4]
        for name, values in out.terms.items():
            self.add(name, values)
            of_each = th.where(quartile.bool(), values.detach().float()[:, None], 0.0)  # not 0 times NaN
            pairs = th.stack([of_each.sum(0), quartile.sum(0).float()], dim=1)  # [4, 2]
            for q in range(4):
                self._add_pair(f"{name}_q{q}", pairs[q])

    def _add_pair(self, name: str, pair: th.Tensor) -> None:
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, sums: Mapping[str, th.Tensor]) -> None:
        """Take in another's sums, gathered elsewhere."""
        if self.sums.keys() == sums.keys():
            th._foreach_add_(list(self.sums.values()), [sums[name] for name in self.sums])
        else:
            both = {name: self.sums[name] + pair for name, pair in sums.items() if name in self.sums}
            self.sums = {**self.sums, **sums, **both}

    def read(self) -> dict[str, float]:
        """The means over all ranks, and start anew. Collective; waits for the device."""
        totals = self.totals()
        self.sums = {}
        pairs = {name: pair.tolist() for name, pair in totals.items()}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def totals(self) -> dict[str, th.Tensor]:
        """Each quantity's sum and count over all ranks, [2], on the device. Collective."""
        names = list(self.sums)
        if not names:
            return {}
        totals = dist_util.all_reduce_sum(th.stack([self.sums[name] for name in names]))
        return dict(zip(names, totals, strict=True))

    def load_totals(self, totals: Mapping[str, th.Tensor]) -> None:
        """Continue from `totals`, which rank 0 takes up for all."""
        share = float(dist_util.rank() == 0)
        self.sums = {name: pair.to(dist_util.dev()) * share for name, pair in totals.items()}
