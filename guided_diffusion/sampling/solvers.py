"""Higher-order solvers of the diffusion ODE, by the multistep schedulers of diffusers.

A solver takes few, long steps along the path that DDIM follows at first order (DDIM section 4.3). Our
process does the rest, as for its own samplers: it gives the steps, their betas, the timesteps that the
network is called with, and the predicted, clipped x_0, whatever the network predicts.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch as th

from ..gaussian_diffusion import GaussianDiffusion, Model, NoiseFn, Sample, last_sample
from .samplers import Sampler

try:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
except ImportError as error:
    raise ImportError(f"it needs pip install 'diffusers>=0.35' ({' '.join(str(error).split())})") from error


def make_scheduler(scheduler_class: Any, diffusion: GaussianDiffusion) -> Any:
    """A scheduler at the start of one trajectory through all the process's steps, T-1 to 0.

    To the scheduler the (respaced) process is a trained one whose every step is visited, so nothing of
    diffusers' own choice of timesteps enters. A scheduler remembers its trajectory: make one for each.

    Raises:
        RuntimeError: this version of diffusers visits other timesteps.
    """
    steps = diffusion.num_timesteps
    scheduler = scheduler_class(
        num_train_timesteps=steps,
        trained_betas=diffusion.betas,
        prediction_type="sample",
        timestep_spacing="trailing",  # T steps of T are then exactly T-1 .. 0, for both
    )
    # diffusers multiplies up in float32, which loses 1 - alpha_bar at the clean end, alpha_bar at the other.
    # Where all is noise it takes 2^-24, having no logarithm of 0.
    bars = diffusion.alphas_cumprod
    scheduler.alphas_cumprod = th.from_numpy(np.where(bars > 0, bars, 2.0**-24))
    scheduler.set_timesteps(steps)
    if not np.array_equal(scheduler.timesteps, np.arange(steps)[::-1]):
        raise RuntimeError(f"this version of diffusers visits other timesteps: {scheduler.timesteps}")
    scheduler.set_begin_index(0)
    return scheduler


def solver_sample_loop(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    *,
    scheduler_class: Any,
    noise: th.Tensor | None = None,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    noise_fn: NoiseFn | None = None,
) -> th.Tensor:
    """Samples [B, C, H, W] from noise, deterministic as DDIM's; the model is called T times.

    Args:
        diffusion: the (respaced) process whose T steps are taken.
        model: called as model(x, timesteps, **model_kwargs).
        shape: (B, C, H, W).
        scheduler_class: a multistep scheduler of diffusers'.
        noise: the start x_T; drawn when left out.
        clip_denoised: clip the predicted x_0.
        model_kwargs: further arguments of the model.
        noise_fn: draws the start, and nothing else.
    """
    scheduler = make_scheduler(scheduler_class, diffusion)

    def step(x: th.Tensor, t: th.Tensor) -> Sample:
        pred_xstart = diffusion.p_mean_variance(model, x, t, clip_denoised, None, model_kwargs)["pred_xstart"]
        return Sample(sample=scheduler.step(pred_xstart, t[0], x).prev_sample, pred_xstart=pred_xstart)

    return last_sample(diffusion.chain(step, model, shape, noise=noise, noise_fn=noise_fn))


# DPM-Solver++ 2M (Lu et al., 2022, algorithm 2), and UniPC-2 with B(h) = e^h - 1 (Zhao et al., 2023). Both
# are multistep and call the network once per step. A plain number of steps ends a stride before the clean
# image: guided-diffusion's last step starts at t = 0, a leap for them where little is left to remove.
DPMPP_2M = Sampler(partial(solver_sample_loop, scheduler_class=DPMSolverMultistepScheduler), "trailing")
UNIPC = Sampler(partial(solver_sample_loop, scheduler_class=UniPCMultistepScheduler), "trailing")
