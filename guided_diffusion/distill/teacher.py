"""The teacher: a network, its process, and the space its samples live in."""

from dataclasses import dataclass

import torch as th

from ..gaussian_diffusion import GaussianDiffusion
from ..networks.base import DenoisingNetwork
from ..spaces import SampleSpace


@dataclass(frozen=True)
class TeacherStep:
    """One teacher evaluation at (x_t, t).

    Attributes:
        eps: the noise prediction, float32 [B, C, H, W].
        mean: of the reverse step p(x_{t-1} | x_t), float32 [B, C, H, W].
        log_variance: of that step, float32 [B, C, H, W].
        x_next: x_{t-1} drawn from it, or a jump's x_s, float32 [B, C, H, W].
        features, bottleneck: the network's maps (see `Evaluation`), if asked for.
    """

    eps: th.Tensor
    mean: th.Tensor
    log_variance: th.Tensor
    x_next: th.Tensor
    features: th.Tensor | None = None
    bottleneck: th.Tensor | None = None


class Teacher:
    """A trained network that is only evaluated.

    Args:
        network: in eval mode, on the device.
        process: its process.
        space: what its samples are.
    """

    def __init__(self, network: DenoisingNetwork, process: GaussianDiffusion, space: SampleSpace):
        self.network, self.process, self.space = network, process, space

    @th.no_grad()
    def step(
        self,
        x_t: th.Tensor,
        t: th.Tensor,
        y: th.Tensor | None = None,
        *,
        s: th.Tensor | None = None,
        features: bool = False,
    ) -> TeacherStep:
        """Evaluate once: the student's target and the sample's own next state together.

        The predicted x_0 is clipped to the process's bounds; no noise is added on the way to the clean image
        (DDPM algorithm 2).

        Args:
            x_t: float32 [B, C, H, W].
            t: int64 [B], steps of the process.
            y: int64 [B] class labels if and only if the network is class-conditional.
            s: int64 [B], -1 <= s < t, where the next state lies (-1: the clean image); t - 1 when left out.
                The target is the step to t - 1 all the same.
            features: hand out the network's maps too.
        """
        timesteps = self.process.model_timesteps(t)
        maps: tuple[th.Tensor | None, ...] = ()
        if features:
            evaluation = self.network.evaluate(x_t, timesteps, y)
            output, maps = evaluation.output, (evaluation.features, evaluation.bottleneck)
        else:
            output = self.network(x_t, timesteps, y)
        out = self.process.p_distribution(output, x_t, t)
        eps = self.process.eps_of(output, x_t, t)
        jump = out if s is None else self.process.p_distribution(output, x_t, t, s=s)
        noise_mask = (t > 0 if s is None else s >= 0).float().reshape(-1, 1, 1, 1)
        x_next = jump["mean"] + noise_mask * th.exp(0.5 * jump["log_variance"]) * th.randn_like(x_t)
        return TeacherStep(eps, out["mean"], out["log_variance"], x_next, *maps)

    @th.no_grad()
    def jump(self, x_t: th.Tensor, t: th.Tensor, s: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """Evaluate once, and draw x_s, float32 [B, C, H, W], for any earlier steps 0 <= s < t; arguments as
        `step`.
        """
        return self.step(x_t, t, y, s=s).x_next
