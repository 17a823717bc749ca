"""Noise schedules and the forward process q.

Equations are from DDPM (Ho et al., 2020) and Improved DDPM (Nichol & Dhariwal, 2021). Images are
float32 [B, 3, H, W] in [-1, 1]; t is int64 [B] in {0..T-1}, an index into the process's own (possibly
respaced) steps, t = 0 being the cleanest.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch as th


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a named schedule, float64 [T].

    "linear": DDPM's 1e-4..0.02 over 1000 steps, scaled to T. "cosine": Improved DDPM eq. 17.

    Raises:
        ValueError: unknown name.
    """
    steps = num_diffusion_timesteps
    if schedule_name == "linear":
        scale = 1000 / steps
        return np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
    if schedule_name == "cosine":
        # The offset 0.008 keeps beta_0 from vanishing; 0.999 keeps beta_{T-1} below 1.
        return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise ValueError(f"unknown noise schedule '{schedule_name}', expected 'linear' or 'cosine'")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas, float64 [T], whose cumulative product of 1 - beta follows alpha_bar on [0, 1]."""
    steps = num_diffusion_timesteps
    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(1 - np.array(ratios, dtype=np.float64), max_beta)


class ForwardProcess:
    """The process q that turns images into noise, and the tables derived from its betas.

    Args:
        betas: [T], each in (0, 1].
        rescale_timesteps: feed the model timesteps scaled to 0..1000, as float32.
        timestep_map: int [T], the original timestep of each step; 0..T-1 when left out.
        original_num_steps: steps of the process that the map points into; T when left out.

    Raises:
        ValueError: betas of a wrong shape or range.

    Attributes:
        num_timesteps: T.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, sqrt_alphas_cumprod,
        sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod, sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod, posterior_variance, posterior_log_variance_clipped,
        posterior_mean_coef1, posterior_mean_coef2: float64 [T] each.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray | Sequence[float],
        rescale_timesteps: bool = False,
        timestep_map: Sequence[int] | None = None,
        original_num_steps: int | None = None,
    ):
        self.rescale_timesteps = rescale_timesteps

        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional and within (0, 1]")
        self.betas = betas
        self.num_timesteps = len(betas)
        self.timestep_map = list(range(len(betas)) if timestep_map is None else timestep_map)
        self.original_num_steps = original_num_steps or self.num_timesteps
        self._tables: dict[tuple[str, th.device], th.Tensor] = {}

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self._one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7. Its variance is 0 at t = 0, so the log is clipped
        # to the value at t = 1.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (
            (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)
        )
        self._log_betas = np.log(betas)
        # The larger of DDPM's two fixed choices is beta, but the posterior variance at t = 0.
        self._fixed_large_log_variance = np.log(np.append(first, betas[1:]))

    def at(self, name: str, t: th.Tensor) -> th.Tensor:
        """Entries t of the table called `name`, as float32 [B, 1, 1, 1] on t's device."""
        key = (name, t.device)
        if key not in self._tables:
            self._tables[key] = th.from_numpy(getattr(self, name)).float().to(t.device)
        return self._tables[key][t].reshape(-1, 1, 1, 1)

    def model_timesteps(self, t: th.Tensor) -> th.Tensor:
        """The timesteps that the model is called with, [B], for this process's steps t."""
        key = ("timestep_map", t.device)
        if key not in self._tables:
            self._tables[key] = th.tensor(self.timestep_map, device=t.device)
        original = self._tables[key][t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean [B, 3, H, W], variance and log variance [B, 1, 1, 1] of q(x_t | x_0), DDPM eq. 4."""
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start,
            self.at("_one_minus_alphas_cumprod", t),
            self.at("log_one_minus_alphas_cumprod", t),
        )

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """Draw x_t from q(x_t | x_0): [B, 3, H, W]; `noise` is the epsilon, drawn when left out."""
        noise = th.randn_like(x_start) if noise is None else noise
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start + self.at("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7."""
        mean = self.at("posterior_mean_coef1", t) * x_start + self.at("posterior_mean_coef2", t) * x_t
        return mean, self.at("posterior_variance", t), self.at("posterior_log_variance_clipped", t)
