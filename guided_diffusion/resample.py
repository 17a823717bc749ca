"""How the timesteps of plain training are drawn (Improved DDPM, section 3.3)."""

import math
from abc import ABC, abstractmethod

import torch as th
from torch import nn

from . import dist_util
from .errors import UserError


def create_named_schedule_sampler(name: str, num_timesteps: int) -> "ScheduleSampler":
    """Build the sampler called "uniform" or "loss-second-moment" over {0..num_timesteps-1}.

    Raises:
        UserError: unknown name.
    """
    if name == "uniform":
        return UniformSampler(num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(num_timesteps)
    raise UserError(f"schedule_sampler: '{name}' is neither 'uniform' nor 'loss-second-moment'")


class ScheduleSampler(nn.Module, ABC):
    """A distribution over t in {0..T-1}; what it learns lies in buffers, so that it can be saved."""

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.num_timesteps = num_timesteps

    @abstractmethod
    def probabilities(self) -> th.Tensor:
        """p(t), float64 [T] on the CPU."""

    def sample(self, batch_size: int, device: th.device | str) -> tuple[th.Tensor, th.Tensor]:
        """Draw t, int64 [B], and the weights 1 / (T p(t)), float32 [B], that keep losses unbiased."""
        p = self.probabilities()
        t = th.multinomial(p, batch_size, replacement=True)
        return t.to(device), (1 / (self.num_timesteps * p[t])).float().to(device)

    def update_with_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        """Learn from this rank's timesteps, int64 [B], and losses [B]; all ranks call it together."""


class UniformSampler(ScheduleSampler):
    """p(t) = 1/T."""

    def probabilities(self) -> th.Tensor:
        """Uniform."""
        return th.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=th.float64)


class LossSecondMomentResampler(ScheduleSampler):
    """p(t) proportional to the root mean square of the last losses seen at t (Improved DDPM eq. 18).

    Uniform until every t has been seen `history` times; afterwards a share `uniform_share` stays uniform.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_share: float = 0.001):
        super().__init__(num_timesteps)
        self.uniform_share = uniform_share
        self.losses: th.Tensor
        self.counts: th.Tensor
        self.register_buffer("losses", th.zeros(num_timesteps, history, dtype=th.float64))
        self.register_buffer("counts", th.zeros(num_timesteps, dtype=th.int64))

    def probabilities(self) -> th.Tensor:
        """Probability of each timestep, float64 [T]."""
        losses, counts = self.losses.cpu(), self.counts.cpu()
        uniform = th.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=th.float64)
        if (counts < losses.shape[1]).any():
            return uniform
        p = losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform_share) * p / p.sum() + self.uniform_share * uniform

    def update_with_losses(self, t: th.Tensor, losses: th.Tensor) -> None:
        """Put every rank's losses into the history, the newest last, and leave out what is not finite."""
        all_t = dist_util.all_gather(t.to(self.losses.device)).tolist()
        all_losses = dist_util.all_gather(losses.detach().double().to(self.losses.device)).tolist()
        length = self.losses.shape[1]
        for step, loss in zip(all_t, all_losses, strict=True):
            if not math.isfinite(loss):
                continue  # the step is skipped too
            row = self.losses[step]
            if self.counts[step] == length:
                row[:-1] = row[1:].clone()
                row[-1] = loss
            else:
                row[int(self.counts[step])] = loss
                self.counts[step] += 1
