"""Sampling where image i depends on (seed, i) alone, not on batch size or number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from ..networks.base import DenoisingNetwork
from ..spaces import SampleSpace

_AHEAD = 1 << 15  # numbers that a row's generator draws at once on a GPU


@dataclass(frozen=True)
class Sampler:
    """A way of going from noise to x_0. `config.registry.SAMPLERS` gives it a name.

    Attributes:
        loop: called as loop(process, network, shape, noise=, clip_denoised=, model_kwargs=, noise_fn=), whose
            options mean what they do in `GaussianDiffusion.p_sample_loop_progressive`; returns x_0.
        spacing: stands before a plain number of steps: with "trailing", 20 means "trailing20" (see
            `respace.space_timesteps`).
    """

    loop: Callable[..., th.Tensor]
    spacing: str = ""

    def respacing(self, steps: str) -> str:
        """What `--timestep_respacing` stands for."""
        return f"{self.spacing}{steps}" if steps.isdigit() else steps


ANCESTRAL = Sampler(GaussianDiffusion.p_sample_loop)  # every reverse step drawn at random
DDIM = Sampler(GaussianDiffusion.ddim_sample_loop)  # deterministic


class SeededNoise:
    """Standard normal noise whose row i comes from a generator of its own.

    Args:
        seed: of the whole set of samples.
        indices: the number of each row's sample within the set.
        device: where the noise is drawn. The stream differs between kinds of device.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: th.device | str):
        self.generators: list[th.Generator] = []
        self._ahead: list[th.Tensor] = []
        for index in indices:
            state = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
            generator = th.Generator(device)
            generator.manual_seed(int(state[0]) << 32 | int(state[1]))
            self.generators.append(generator)

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Noise of x's shape; every call continues each row's stream."""
        if not self._ahead:
            # On a GPU each row is a launch, which costs a small one as much for several calls as for one. How
            # many must not depend on the batch, lest the images do.
            on_gpu = self.generators[0].device.type == "cuda"
            calls = max(1, _AHEAD // x[0].numel()) if on_gpu else 1
            rows = [
                th.randn((calls, *x.shape[1:]), generator=generator, device=generator.device, dtype=x.dtype)
                for generator in self.generators
            ]
            self._ahead = list(th.stack(rows, dim=1))
        return self._ahead.pop(0).to(x.device)

    def labels(self, num_classes: int) -> th.Tensor:
        """A random class for each row, int64 [B]."""
        draws = [th.randint(num_classes, (1,), generator=g, device=g.device) for g in self.generators]
        return th.cat(draws)


def sample_images(
    network: DenoisingNetwork,
    process: GaussianDiffusion,
    space: SampleSpace,
    indices: Sequence[int],
    *,
    seed: int = 0,
    sampler: Sampler = ANCESTRAL,
    clip_denoised: bool = True,
    require_finite: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Sample a batch of images with the network on its device, in eval mode.

    Args:
        network: the network.
        process: its (respaced) process.
        space: what its samples are.
        indices: the samples' numbers within their set; one image each.
        seed: the set's seed.
        sampler: how.
        clip_denoised: clip the predicted x_0 to the process's bounds in every step.
        require_finite: raise where numbers that are not finite would become black pixels.

    Returns:
        Images uint8 [B, H, W, 3], and labels int64 [B] if the network is class-conditional, else None.

    Raises:
        UserError: see `require_finite`.
    """
    device = next(network.parameters()).device
    noise = SeededNoise(seed, indices, device)
    y = None if network.num_classes is None else noise.labels(network.num_classes)
    was_training = network.training
    network.eval()
    try:
        x = sampler.loop(
            process,
            network,
            (len(indices), *network.shape),
            clip_denoised=clip_denoised,
            model_kwargs={} if y is None else {"y": y},
            noise_fn=noise,
        )
    finally:
        network.train(was_training)
    if require_finite and not x.isfinite().all():
        which = f"samples {indices[0]} to {indices[-1]}"
        raise UserError(f"{which}: the network gives no finite numbers{process.why_not_finite()}")
    return space.decode(x), None if y is None else y.cpu().numpy()
