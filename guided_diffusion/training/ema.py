"""Exponential moving averages of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch as th
from torch import nn


class Ema:
    """ema <- rate ema + (1 - rate) weights, after every optimizer step.

    Args:
        module: whose parameters are averaged; the average starts from their present values.
        rate: decay in [0, 1).
    """

    def __init__(self, module: nn.Module, rate: float):
        self.rate = rate
        self.module = module
        self.average = [p.detach().clone() for p in module.parameters()]

    @th.no_grad()
    def update(self, skipped: th.Tensor, warmup_step: int | None = None) -> None:
        """Take in the present weights.

        Args:
            skipped: bool []; the average stays as it is where true. It is not waited for.
            warmup_step: the iterations done before; the rate is then at most (1 + step) / (10 + step),
                so that the average forgets its random start sooner.
        """
        rate = self.rate
        if warmup_step is not None:
            rate = min(rate, (1 + warmup_step) / (10 + warmup_step))
        weights = th._foreach_mul(list(self.module.parameters()), (~skipped).float())
        # Not lerp: near rate 1 float32 rounding is all there is, and this order gives ADM's digits.
        th._foreach_mul_(self.average, th.where(skipped, 1.0, rate))
        th._foreach_add_(self.average, weights, alpha=1 - rate)

    def state_dict(self) -> dict[str, th.Tensor]:
        """The module's state dict with the averaged weights in place of its own."""
        return self.module.state_dict() | self._named()

    @th.no_grad()
    def load_state_dict(self, state: Mapping[str, th.Tensor]) -> None:
        """Take the average from a state dict of the module."""
        for name, average in self._named().items():
            average.copy_(state[name])

    def _named(self) -> dict[str, th.Tensor]:
        """The averages by all names of their weights; one that is used in two places has two."""
        averages = dict(zip(self.module.parameters(), self.average, strict=True))
        names = self.module.named_parameters(remove_duplicate=False)
        return {name: averages[parameter] for name, parameter in names}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the average with the module's weights until the block ends."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @th.no_grad()
    def swap(self) -> None:
        """Exchange the average with the module's weights; a second call undoes it."""
        for parameter, average in zip(self.module.parameters(), self.average, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
