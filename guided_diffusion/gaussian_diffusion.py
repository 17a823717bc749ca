"""Gaussian diffusion: noise schedules, the forward process q, the learned reverse process p, its samplers.

Equations are from DDPM (Ho et al., 2020), Improved DDPM (Nichol & Dhariwal, 2021), DDIM (Song et al., 2021)
and "Diffusion Models Beat GANs" (Dhariwal & Nichol, 2021). Samples are float32 [B, C, H, W], in pixel space
within [-1, 1]; t is int64 [B] in {0..T-1}, an index into the process's own (possibly respaced) steps, t = 0
being the last, cleanest denoising step. No training state lives here.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch as th

from .config.settings import beta_range
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .spaces import PixelSpace

Model = Callable[..., th.Tensor]
DenoisedFn = Callable[[th.Tensor], th.Tensor]
NoiseFn = Callable[[th.Tensor], th.Tensor]


def get_named_beta_schedule(
    schedule_name: str, num_diffusion_timesteps: int, beta_start: float = 0.0, beta_end: float = 0.0
) -> np.ndarray:
    """The betas of a named schedule, float64 [T].

    Args:
        schedule_name: "linear": evenly spaced betas. "scaled_linear": evenly spaced square roots of betas
            (Latent Diffusion, Rombach et al., 2022). "cosine": Improved DDPM eq. 17.
        num_diffusion_timesteps: T.
        beta_start: the first beta of the former two; 0 for DDPM's 1e-4, which "linear" scales by 1000 / T.
        beta_end: their last; 0 for DDPM's 0.02, scaled likewise.

    Raises:
        ValueError: unknown name.
    """
    steps = num_diffusion_timesteps
    if schedule_name == "cosine":
        # The offset 0.008 keeps beta_0 from vanishing; 0.999 keeps beta_{T-1} below 1.
        return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    start, end = beta_range(schedule_name, steps, beta_start, beta_end)
    if schedule_name == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if schedule_name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    raise ValueError(
        f"unknown noise schedule '{schedule_name}', expected 'linear', 'cosine' or 'scaled_linear'"
    )


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas, float64 [T], whose cumulative product of 1 - beta follows alpha_bar on [0, 1]."""
    steps = num_diffusion_timesteps
    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(1 - np.array(ratios, dtype=np.float64), max_beta)


class ModelMeanType(enum.Enum):
    """What the model's first C channels predict; the values are those of the key prediction_type."""

    START_X = "sample"
    EPSILON = "epsilon"
    VELOCITY = "v_prediction"  # v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho, 2022, appendix D)


class ModelVarType(enum.Enum):
    """The reverse process's variance; LEARNED_RANGE reads it from C further channels."""

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE, with the variational bound beside it when the variance is learned, or the bound alone."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()  # the bound is multiplied by T/1000
    KL = enum.auto()
    RESCALED_KL = enum.auto()  # the bound is multiplied by T

    @property
    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class Prediction(TypedDict):
    """The reverse step's Gaussian p(x_{t-1} | x_t) and the x_0 it stands on, each [B, C, H, W]."""

    mean: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor


class Sample(TypedDict):
    """One reverse step's outcome x_{t-1} and the x_0 it stands on, each [B, C, H, W]."""

    sample: th.Tensor
    pred_xstart: th.Tensor


class PosteriorStep(NamedTuple):
    """A step of the posterior q(x_s | x_t, x_0), each entry float32 [B, 1, 1, 1].

    Attributes:
        x_start: the factor of x_0 in the mean (DDPM eq. 7).
        x_t: that of x_t.
        min_log_variance: the posterior's own, log beta~ (clipped at t = 0).
        max_log_variance: log beta, the other end of what a network may learn (Improved DDPM eq. 15).
    """

    x_start: th.Tensor
    x_t: th.Tensor
    min_log_variance: th.Tensor
    max_log_variance: th.Tensor


class GaussianDiffusion:
    """A diffusion process: q, the learned reverse p, the losses that train it, and its samplers.

    Args:
        betas: [T], each in (0, 1].
        model_mean_type: what the model predicts.
        model_var_type: which reverse variance is used: learned, beta or the posterior's.
        loss_type: what `training_losses` returns.
        rescale_timesteps: feed the model timesteps scaled to 0..1000, as float32.
        bounds: where the predicted x_0 is clipped when clipping is asked for; None for never.
        timestep_map: int [T], the original timestep of each step; 0..T-1 when left out.
        original_num_steps: steps of the process that the map points into; T when left out.

    Raises:
        ValueError: betas of a wrong shape or range.

    Attributes:
        num_timesteps: T.
        betas: float64 [T], as are alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next,
            sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, log_one_minus_alphas_cumprod,
            sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod, posterior_variance,
            posterior_log_variance_clipped, posterior_mean_coef1 and posterior_mean_coef2.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray | Sequence[float],
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        bounds: tuple[float, float] | None = PixelSpace.bounds,
        timestep_map: Sequence[int] | None = None,
        original_num_steps: int | None = None,
    ):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.bounds = bounds
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional, within (0, 1], and at least one")
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
        with np.errstate(divide="ignore"):  # a schedule may end in noise alone
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
        """Mean [B, C, H, W], variance and log variance [B, 1, 1, 1] of q(x_t | x_0), DDPM eq. 4."""
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start,
            self.at("_one_minus_alphas_cumprod", t),
            self.at("log_one_minus_alphas_cumprod", t),
        )

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """Draw x_t from q(x_t | x_0): [B, C, H, W]; `noise` is the epsilon, drawn when left out."""
        noise = th.randn_like(x_start) if noise is None else noise
        return (
            self.at("sqrt_alphas_cumprod", t) * x_start + self.at("sqrt_one_minus_alphas_cumprod", t) * noise
        )

    def why_not_finite(self) -> str:
        """What the process itself has to do with samples that are not finite, to end a message with."""
        if self.alphas_cumprod[-1] > 0:
            return ""
        return "; its noise schedule ends in noise alone, from which no prediction of the noise leads back"

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7."""
        mean = self.at("posterior_mean_coef1", t) * x_start + self.at("posterior_mean_coef2", t) * x_t
        return mean, self.at("posterior_variance", t), self.at("posterior_log_variance_clipped", t)

    def p_mean_variance(
        self,
        model: Model,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool | th.Tensor = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Prediction:
        """Apply the model to x_t and return p(x_{t-1} | x_t); see `p_distribution`."""
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self.p_distribution(output, x, t, clip_denoised, denoised_fn)

    def p_distribution(
        self,
        model_output: th.Tensor,
        x: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool | th.Tensor = True,
        denoised_fn: DenoisedFn | None = None,
        s: th.Tensor | None = None,
    ) -> Prediction:
        """The reverse step's Gaussian for a given model output.

        Args:
            model_output: [B, C, H, W], or [B, 2C, H, W] when the variance is learned.
            x: x_t, [B, C, H, W].
            t: int64 [B].
            clip_denoised: clip the predicted x_0 to `bounds`; a bool [B] says so per sample.
            denoised_fn: applied to the predicted x_0 before clipping.
            s: int64 [B], -1 <= s < t: where the step leads, t - 1 when left out. It is the reverse step of
                the process that keeps only s and t (Improved DDPM section 4, respacing, per sample instead
                of per process); -1 is the clean image, and the mean is then the predicted x_0.

        Raises:
            ValueError: the output has a wrong number of channels.
        """
        prediction, values = self.split(model_output, x.shape[1])
        pred_xstart = self._predict_xstart(x, t, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if self.bounds is not None:
            if isinstance(clip_denoised, th.Tensor):
                mask = clip_denoised.reshape(-1, 1, 1, 1)
                pred_xstart = th.where(mask, pred_xstart.clamp(*self.bounds), pred_xstart)
            elif clip_denoised:
                pred_xstart = pred_xstart.clamp(*self.bounds)

        step = self.posterior_step(t, s)
        if values is not None:
            # Improved DDPM eq. 15: v in [-1, 1] interpolates between the two bounds in the log domain.
            fraction = (values + 1) / 2
            log_variance = fraction * step.max_log_variance + (1 - fraction) * step.min_log_variance
        elif self.model_var_type is ModelVarType.FIXED_LARGE:
            log_variance = step.max_log_variance
        else:
            log_variance = step.min_log_variance
        log_variance = log_variance.expand_as(x)
        if self.model_var_type is ModelVarType.FIXED_SMALL and s is None:
            variance = self.at("posterior_variance", t).expand_as(x)  # 0 at t = 0; its log is clipped
        else:
            variance = log_variance.exp()
        mean = step.x_start * pred_xstart + step.x_t * x
        return Prediction(mean=mean, variance=variance, log_variance=log_variance, pred_xstart=pred_xstart)

    def posterior_step(self, t: th.Tensor, s: th.Tensor | None = None) -> PosteriorStep:
        """What the posterior of x_s given x_t and x_0 is made of.

        Args:
            t: int64 [B].
            s: int64 [B], -1 <= s < t, computed in float64; t - 1 when left out. At s = -1 the smallest
                variance is the largest.
        """
        if s is None:
            fixed = self.model_var_type is ModelVarType.FIXED_LARGE
            return PosteriorStep(
                self.at("posterior_mean_coef1", t),
                self.at("posterior_mean_coef2", t),
                self.at("posterior_log_variance_clipped", t),
                self.at("_fixed_large_log_variance" if fixed else "_log_betas", t),
            )
        key = ("alphas_cumprod from s = -1", t.device)
        if key not in self._tables:
            self._tables[key] = th.from_numpy(np.append(1.0, self.alphas_cumprod)).to(t.device)
        bar_t, bar_s = (self._tables[key][i + 1].reshape(-1, 1, 1, 1) for i in (t, s))
        beta = 1 - bar_t / bar_s
        small = th.where(bar_s < 1, beta * (1 - bar_s) / (1 - bar_t), beta)
        return PosteriorStep(
            (bar_s.sqrt() * beta / (1 - bar_t)).float(),
            ((1 - bar_s) * (1 - beta).sqrt() / (1 - bar_t)).float(),
            small.log().float(),
            beta.log().float(),
        )

    def split(self, model_output: th.Tensor, channels: int) -> tuple[th.Tensor, th.Tensor | None]:
        """The prediction [B, C, H, W], and the values that interpolate the variance, if it is learned.

        Raises:
            ValueError: the output has a wrong number of channels.
        """
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        expected = 2 * channels if learned else channels
        if model_output.shape[1] != expected:
            raise ValueError(
                f"the model gives {model_output.shape[1]} channels, this process needs {expected} "
                f"(learned variance: {learned})"
            )
        return (model_output[:, :channels], model_output[:, channels:]) if learned else (model_output, None)

    def _predict_xstart(self, x_t: th.Tensor, t: th.Tensor, prediction: th.Tensor) -> th.Tensor:
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self.predict_xstart_from_eps(x_t, t, prediction)
        signal, noise = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return signal * x_t - noise * prediction

    def predict_eps(self, x_t: th.Tensor, t: th.Tensor, prediction: th.Tensor) -> th.Tensor:
        """The noise prediction [B, C, H, W] that a prediction of eps, x_0 or v amounts to."""
        if self.model_mean_type is ModelMeanType.EPSILON:
            return prediction
        if self.model_mean_type is ModelMeanType.START_X:
            return self.predict_eps_from_xstart(x_t, t, prediction)
        signal, noise = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
        return signal * prediction + noise * x_t

    def eps_of(self, model_output: th.Tensor, x_t: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The noise prediction [B, C, H, W] in a model's output, with or without a variance, at (x_t, t)."""
        return self.predict_eps(x_t, t, self.split(model_output, x_t.shape[1])[0])

    def predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """x_0 = x_t / sqrt(abar) - eps sqrt(1 / abar - 1), DDPM eq. 4 solved for x_0."""
        return self.at("sqrt_recip_alphas_cumprod", t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t) * eps

    def clipped_xstart(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """`predict_xstart_from_eps`, clipped to `bounds`."""
        pred_xstart = self.predict_xstart_from_eps(x_t, t, eps)
        return pred_xstart if self.bounds is None else pred_xstart.clamp(*self.bounds)

    def predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        """The inverse of `predict_xstart_from_eps`; where x_t is noise alone (abar = 0), x_t itself."""
        eps = self.at("sqrt_recip_alphas_cumprod", t) * x_t - pred_xstart
        return self.where_known(t, eps / self.at("sqrt_recipm1_alphas_cumprod", t), x_t)

    def where_known(self, t: th.Tensor, value: th.Tensor, otherwise: th.Tensor) -> th.Tensor:
        """A value [B, C, H, W] that needs x_0 and eps to tell each other; `otherwise` where they do not.

        That is where x_t is noise alone (abar = 0): there eps is x_t, whatever x_0 is.
        """
        if self.alphas_cumprod[-1] > 0:
            return value
        return th.where(self.at("sqrt_recip_alphas_cumprod", t).isfinite(), value, otherwise)

    def vb_terms_bpd(
        self,
        model_output: th.Tensor,
        x_start: th.Tensor,
        x_t: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool | th.Tensor = True,
    ) -> tuple[th.Tensor, th.Tensor]:
        """One term of the variational bound in bits per dimension, [B], and the predicted x_0.

        The KL to q(x_{t-1} | x_t, x_0), or at t = 0 the negative log likelihood of the discretised
        decoder (DDPM eq. 5).
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_distribution(model_output, x_t, t, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        bits = th.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)
        return bits, out["pred_xstart"]

    def training_losses(
        self,
        model: Model,
        x_start: th.Tensor,
        t: th.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: th.Tensor | None = None,
        clip_denoised: bool | th.Tensor = False,
    ) -> dict[str, th.Tensor]:
        """The loss terms of one batch (Improved DDPM section 3.1: L_hybrid).

        Args:
            model: called as model(x_t, timesteps, **model_kwargs).
            x_start: [B, C, H, W].
            t: int64 [B].
            model_kwargs: further arguments of the model.
            noise: the epsilon of q_sample; drawn when left out.
            clip_denoised: clip the predicted x_0 inside the bound, as in `p_distribution`.

        Returns:
            "loss" [B]; with an MSE loss also "mse", and "vb" (bits/dim, its gradient reaching only
            the variance) when the variance is learned.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb:
            loss, _ = self.vb_terms_bpd(output, x_start, x_t, t, clip_denoised)
            return {"loss": loss * (self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1)}

        terms = {}
        prediction, values = self.split(output, x_start.shape[1])
        if values is not None:
            frozen = th.cat([prediction.detach(), values], dim=1)
            terms["vb"] = self.vb_weight * self.vb_terms_bpd(frozen, x_start, x_t, t, clip_denoised)[0]
        if self.model_mean_type is ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type is ModelMeanType.START_X:
            target = x_start
        else:
            signal, sigma = self.at("sqrt_alphas_cumprod", t), self.at("sqrt_one_minus_alphas_cumprod", t)
            target = signal * noise - sigma * x_start
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    @property
    def vb_weight(self) -> float:
        """Weight of the bound beside the MSE: T/1000 with rescaled sigmas, else 1."""
        return self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1.0

    @property
    def last_kl_gain(self) -> float:
        """How many nats the KL at t = T-1 has per squared error of eps, in the mean, x_0 not being clipped.

        0 where there is no KL, or the model does not predict eps. With the cosine schedule it is 500 of 1,000
        steps, and 200,000 of 50 of them.
        """
        if self.model_var_type is not ModelVarType.LEARNED_RANGE:
            return 0.0
        if self.model_mean_type is not ModelMeanType.EPSILON or self.posterior_variance[-1] == 0:
            return 0.0
        factor = self.posterior_mean_coef1[-1] * self.sqrt_recipm1_alphas_cumprod[-1]
        return float(factor**2 / (2 * self.posterior_variance[-1]))

    def prior_bpd(self, x_start: th.Tensor) -> th.Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [B]; the bound's constant term."""
        t = th.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: th.Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, th.Tensor]:
        """The whole variational bound in bits per dimension.

        Args:
            model: called as model(x_t, timesteps, **model_kwargs).
            x_start: [B, C, H, W].
            clip_denoised: clip the predicted x_0 to `bounds`.
            model_kwargs: further arguments of the model.

        Returns:
            "total_bpd" and "prior_bpd" [B]; "vb", "xstart_mse" and "mse" (of epsilon) [B, T], the
            first column belonging to t = T-1.
        """
        columns: dict[str, list[th.Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = th.full((len(x_start),), i, device=x_start.device)
            noise = th.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with th.no_grad():
                output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
                vb, pred_xstart = self.vb_terms_bpd(output, x_start, x_t, t, clip_denoised)
            eps = self.predict_eps_from_xstart(x_t, t, pred_xstart)
            columns["vb"].append(vb)
            columns["xstart_mse"].append(mean_flat((pred_xstart - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: th.stack(values, dim=1) for name, values in columns.items()}
        terms["prior_bpd"] = self.prior_bpd(x_start)
        terms["total_bpd"] = terms["vb"].sum(dim=1) + terms["prior_bpd"]
        return terms

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
            x: x_t, [B, C, H, W].
            t: int64 [B].
            clip_denoised: clip the predicted x_0 to `bounds`.
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
        towards_x_t = th.sqrt((1 - bar_prev - sigma**2).clamp(min=0))  # rounding can take it below 0
        mean = pred_xstart * th.sqrt(bar_prev) + towards_x_t * eps
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
        eta: float = 0.0,
    ) -> Sample:
        """One step of the DDIM ODE towards noise, x_t -> x_{t+1} (DDIM section 4.3).

        Raises:
            ValueError: `eta` is not 0: with noise there is no way back.
        """
        if eta:
            raise ValueError(f"eta must be 0 on the way to noise, not {eta}")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.predict_eps_from_xstart(x, t, out["pred_xstart"])
        bar_next = self.at("alphas_cumprod_next", t)
        sample = out["pred_xstart"] * th.sqrt(bar_next) + th.sqrt(1 - bar_next) * eps
        return Sample(sample=sample, pred_xstart=out["pred_xstart"])

    def p_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **kwargs: Any) -> th.Tensor:
        """Ancestral samples [B, C, H, W] from noise; arguments as `p_sample_loop_progressive`."""
        return last_sample(self.p_sample_loop_progressive(model, shape, *args, **kwargs))

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], *args: Any, **kwargs: Any) -> th.Tensor:
        """DDIM samples [B, C, H, W] from noise; arguments as `ddim_sample_loop_progressive`."""
        return last_sample(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))

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
            shape: (B, C, H, W).
            noise: the start x_T; drawn when left out.
            clip_denoised: as in `p_sample`.
            denoised_fn: as in `p_sample`.
            cond_fn: as in `p_sample`.
            model_kwargs: as in `p_sample`.
            device: where the chain runs; the model's own when left out.
            progress: show a progress bar.
            noise_fn: as in `p_sample`.
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


def last_sample(samples: Iterator[Sample]) -> th.Tensor:
    """The state at which sampling ends."""
    for out in samples:
        final = out["sample"]
    return final
