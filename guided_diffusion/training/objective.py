"""What a training loop minimises, and the objective of plain diffusion training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn

from ..gaussian_diffusion import GaussianDiffusion
from ..networks.base import DenoisingNetwork
from ..resample import ScheduleSampler


@dataclass(frozen=True)
class PassLoss:
    """The losses of one forward pass.

    Attributes:
        loss: [B], what is minimised in the mean.
        terms: named parts of it for the log, [B] each.
        t: int64 [B], the steps they belong to.
        parts: the losses that it is made of, for the log, if it joins several.
    """

    loss: th.Tensor
    terms: dict[str, th.Tensor]
    t: th.Tensor
    parts: tuple["PassLoss", ...] = ()


class Objective(nn.Module, ABC):
    """What is minimised. As a module it holds whatever is trained beside the network and never sampled from.

    The loop asks for the losses of one batch, pass by pass, and runs each pass's backward before the next is
    built.
    """

    @property
    def capturable(self) -> bool:
        """Whether `passes` launches the same kernels at every call and never waits for the device, so that
        an iteration can be a CUDA graph. A subclass must say so for itself.
        """
        return False

    @abstractmethod
    def passes(self, network: DenoisingNetwork, batch: Any) -> Iterator[PassLoss]:
        """Yield the losses of a (micro)batch, one forward pass at a time."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the log."""

    def load_foreign_head(self, state: Mapping[str, th.Tensor], origin: Any) -> None:
        """Take up the noise encoder that the original TCCD keeps in its checkpoints, if there is use for it.

        Args:
            state: its entries.
            origin: the file, for messages.
        """


@dataclass(frozen=True)
class ImageBatch:
    """Samples float32 [B, C, H, W], and class labels int64 [B] or None."""

    x_start: th.Tensor
    y: th.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_start)

    def split(self, size: int) -> Iterator["ImageBatch"]:
        """Yield consecutive pieces of at most `size` samples."""
        for start in range(0, len(self), size):
            y = None if self.y is None else self.y[start : start + size]
            yield ImageBatch(self.x_start[start : start + size], y)


class DiffusionTraining(Objective):
    """Plain training: `GaussianDiffusion.training_losses` at drawn timesteps.

    Args:
        process: the process.
        sampler: draws the timesteps.
        clip_last: clip the predicted x_0 inside the bound at t = T-1, where the cosine schedule otherwise
            makes it huge.
    """

    def __init__(self, process: GaussianDiffusion, sampler: ScheduleSampler, *, clip_last: bool = False):
        super().__init__()
        self.process, self.sampler, self.clip_last = process, sampler, clip_last

    def passes(self, network: DenoisingNetwork, batch: ImageBatch) -> Iterator[PassLoss]:
        """The only pass; its terms are those of `training_losses`."""
        t, weights = self.sampler.sample(len(batch), batch.x_start.device)
        terms = self.process.training_losses(
            network,
            batch.x_start,
            t,
            model_kwargs={} if batch.y is None else {"y": batch.y},
            clip_denoised=t == self.process.num_timesteps - 1 if self.clip_last else False,
        )
        self.sampler.update_with_losses(t, terms["loss"])
        weighted = {name: values * weights for name, values in terms.items()}
        yield PassLoss(weighted.pop("loss"), weighted, t)

    def describe(self) -> str:
        """The kind of loss."""
        return self.process.loss_type.name
