"""Gaussian diffusion: the whole process with its samplers.

Equations are from DDPM (Ho et al., 2020), DDIM (Song et al., 2021) and "Diffusion Models Beat GANs"
(Dhariwal & Nichol, 2021). Images are float32 [B, 3, H, W] in [-1, 1]; t is int64 [B] in {0..T-1}, an
index into the process's own (possibly respaced) steps.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import torch as th

from .reverse_process import (
    DenoisedFn,
    LossType,
    Model,
    ModelMeanType,
    ModelVarType,
    ReverseProcess,
)

__all__ = ["GaussianDiffusion", "LossType", "Model", "ModelMeanType", "ModelVarType", "Sample"]

NoiseFn = Callable[[th.Tensor], th.Tensor]


class Sample(TypedDict):
    """One reverse step's outcome x_{t-1} and the x_0 it stands on, each [B, 3, H, W]."""

    sample: th.Tensor
    pred_xstart: th.Tensor


class GaussianDiffusion(ReverseProcess):
    """A diffusion process that can be sampled from; built as `ReverseProcess`."""

    def p_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> Sample:
        """One ancestral step x_t -> x_{t-1} (DDPM algorithm 2).

        Args:
            model: called as model(x, timesteps, **model_kwargs).
            x: x_t, [B, 3, H, W].
            t: int64 [B].
            clip_denoised: clip the predicted x_0 to [-1, 1].
            denoised_fn: applied to the predicted x_0 before clipping.
            cond_fn: gradient of log p(y | x_t), called like the model; shifts the mean by
                variance * gradient (Diffusion Models Beat GANs, algorithm 1).
            model_kwargs: further arguments of the model, such as labels y.
            noise_fn: draws standard normal noise like its argument; `torch.randn_like` when left out.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (noise_fn or th.randn_like)(x)
        mean = out["mean"]
        if cond_fn is not None:
            gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
            mean = mean + out["variance"] * gradient
        nonzero = (t != 0).float().reshape(-1, 1, 1, 1)  # the last step is not blurred by noise
        sample = mean + nonzero * th.exp(0.5 * out["log_variance"]) * noise
        return Sample(sample=sample, pred_xstart=out["pred_xstart"])

    def ddim_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Sample:
        """One DDIM step x_t -> x_{t-1} (DDIM eq. 12 and 16); arguments as `p_sample`.

        `eta` in [0, 1] goes from the deterministic to the ancestral-like step. `cond_fn` enters
        through the score (Diffusion Models Beat GANs, algorithm 2).
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self.predict_eps_from_xstart(x, t, pred_xstart)
        if cond_fn is not None:
            gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
            eps = eps - self.at("sqrt_one_minus_alphas_cumprod", t) * gradient
            pred_xstart = self.predict_xstart_from_eps(x, t, eps)
        bar, bar_prev = self.at("alphas_cumprod", t), self.at("alphas_cumprod_prev", t)
        sigma = eta * th.sqrt((1 - bar_prev) / (1 - bar)) * th.sqrt(1 - bar / bar_prev)
        noise = (noise_fn or th.randn_like)(x)
        mean = pred_xstart * th.sqrt(bar_prev) + th.sqrt(1 - bar_prev - sigma**2) * eps
        nonzero = (t != 0).float().reshape(-1, 1, 1, 1)
        return Sample(sample=mean + nonzero * sigma * noise, pred_xstart=pred_xstart)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Sample:
        """One step of the DDIM ODE towards noise, x_t -> x_{t+1} (DDIM section 4.3)."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar_next = self.at("alphas_cumprod_next", t)
        sample = out["pred_xstart"] * th.sqrt(bar_next) + th.sqrt(1 - bar_next) * eps
        return Sample(sample=sample, pred_xstart=out["pred_xstart"])

    def p_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> th.Tensor:
        """Ancestral samples [B, 3, H, W] from noise; options as `p_sample_loop_progressive`."""
        return _last(self.p_sample_loop_progressive(model, shape, **options))

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], **options: Any) -> th.Tensor:
        """DDIM samples [B, 3, H, W] from noise; options as `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model, shape, **options))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """Yield each step's `Sample` of an ancestral chain, from t = T-1 to 0.

        Args:
            model: called as model(x, timesteps, **model_kwargs).
            shape: (B, 3, H, W).
            noise: the start x_T; drawn when left out.
            clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_fn: as in `p_sample`.
            device: where the chain runs; the model's own when left out.
            progress: show a progress bar.
        """

        def step(x: th.Tensor, t: th.Tensor) -> Sample:
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, noise_fn)

        yield from self.chain(step, model, shape, noise, device, progress, noise_fn)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """Yield each step's `Sample` of a DDIM chain; see `p_sample_loop_progressive`."""

        def step(x: th.Tensor, t: th.Tensor) -> Sample:
            return self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, noise_fn
            )

        yield from self.chain(step, model, shape, noise, device, progress, noise_fn)

    def chain(
        self,
        step: Callable[[th.Tensor, th.Tensor], Sample],
        model: Model,
        shape: Sequence[int],
        noise: th.Tensor | None = None,
        device: th.device | str | None = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Sample]:
        """Yield each `Sample` that step(x_t, t) gives, from t = T-1 to 0; see `p_sample_loop_progressive`."""
        if device is None:
            parameters = getattr(model, "parameters", None)
            device = next(parameters()).device if parameters is not None else th.device("cpu")
        if noise is None:
            x = th.empty(*shape, device=device)
            x = noise_fn(x) if noise_fn is not None else th.randn(*shape, device=device)
        else:
            x = noise.to(device)
        steps: Any = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps)
        for i in steps:
            with th.no_grad():
                out = step(x, th.full((shape[0],), i, device=device))
            yield out
            x = out["sample"]


def _last(samples: Iterator[Sample]) -> th.Tensor:
    for out in samples:
        final = out["sample"]
    return final
