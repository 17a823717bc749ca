"""Sampling where image i depends on (seed, i) alone, not on batch size or number of ranks."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch as th

from ..config.settings import SOLVERS
from ..gaussian_diffusion import GaussianDiffusion
from ..unet import UNetModel
from .solvers import scheduler_class, solver_sample_loop


class SeededNoise:
    """Standard normal noise whose row i comes from a generator of its own.

    Args:
        seed: of the whole set of samples.
        indices: the number of each row's sample within the set.
        device: where the noise is drawn. The stream differs between kinds of device.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: th.device | str):
        self.generators = []
        for index in indices:
            state = np.random.SeedSequence([seed, index]).generate_state(2, np.uint32)
            generator = th.Generator(device)
            generator.manual_seed(int(state[0]) << 32 | int(state[1]))
            self.generators.append(generator)

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """Noise of x's shape; every call continues each row's stream."""
        rows = [
            th.randn(x.shape[1:], generator=generator, device=generator.device, dtype=x.dtype)
            for generator in self.generators
        ]
        return th.stack(rows).to(x.device)

    def labels(self, num_classes: int) -> th.Tensor:
        """A random class for each row, int64 [B]."""
        draws = [th.randint(num_classes, (1,), generator=g, device=g.device) for g in self.generators]
        return th.cat(draws)


def sampling_loop(sampler: str) -> Callable[..., th.Tensor]:
    """The loop of one of `settings.SAMPLERS`, to be called as loop(diffusion, model, shape, **options).

    "ancestral" draws every reverse step at random; "ddim" and the solvers follow the deterministic ODE.

    Raises:
        UserError: the sampler needs a package that is not installed.
        ValueError: no such sampler.
    """
    if sampler == "ancestral":
        return GaussianDiffusion.p_sample_loop
    if sampler == "ddim":
        return GaussianDiffusion.ddim_sample_loop
    scheduler_class(sampler)  # so that what is missing is told before anything expensive starts
    return partial(solver_sample_loop, solver=sampler)


def steps_respacing(sampler: str, respacing: str) -> str:
    """What `--timestep_respacing` stands for with a sampler: a solver's plain number N is "trailingN".

    The ancestral and DDIM samplers keep guided-diffusion's meaning of N, whose last step starts at t = 0: a
    leap for a high-order solver, and an evaluation spent where almost nothing is left to remove.
    """
    return f"trailing{respacing}" if sampler in SOLVERS and respacing.isdigit() else respacing


def sample_images(
    model: UNetModel,
    diffusion: GaussianDiffusion,
    indices: Sequence[int],
    *,
    seed: int = 0,
    sampler: str = "ancestral",
    clip_denoised: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Sample a batch of images with the model on its device, in eval mode.

    Args:
        model: the network.
        diffusion: its (respaced) process.
        indices: the samples' numbers within their set; one image each.
        seed: the set's seed.
        sampler: as in `sampling_loop`.
        clip_denoised: clip the predicted x_0 to [-1, 1] in every step.

    Returns:
        Images uint8 [B, H, W, 3], and labels int64 [B] if the model is class-conditional, else None.
    """
    device = next(model.parameters()).device
    noise = SeededNoise(seed, indices, device)
    y = None if model.num_classes is None else noise.labels(model.num_classes)
    loop = sampling_loop(sampler)
    was_training = model.training
    model.eval()
    try:
        x = loop(
            diffusion,
            model,
            (len(indices), 3, model.image_size, model.image_size),
            clip_denoised=clip_denoised,
            model_kwargs={} if y is None else {"y": y},
            noise_fn=noise,
        )
    finally:
        model.train(was_training)
    images = ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1)
    return images.cpu().numpy(), None if y is None else y.cpu().numpy()
