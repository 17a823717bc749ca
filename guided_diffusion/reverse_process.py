"""The learned reverse process p and its losses.

Equations are from DDPM (Ho et al., 2020) and Improved DDPM (Nichol & Dhariwal, 2021). Images are
float32 [B, 3, H, W] in [-1, 1]; t is int64 [B] in {0..T-1}, an index into the process's own (possibly
respaced) steps, t = 0 being the last, cleanest denoising step. No training state lives here.
"""

import enum
import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .schedule import ForwardProcess

Model = Callable[..., th.Tensor]
DenoisedFn = Callable[[th.Tensor], th.Tensor]


class ModelMeanType(enum.Enum):
    """What the model's first three channels predict."""

    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The reverse process's variance; LEARNED_RANGE reads it from three further channels."""

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
    """The reverse step's Gaussian p(x_{t-1} | x_t) and the x_0 it stands on, each [B, 3, H, W]."""

    mean: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    pred_xstart: th.Tensor


class ReverseProcess(ForwardProcess):
    """A diffusion process with its learned reverse p and the losses that train it.

    Args:
        model_mean_type: what the model predicts.
        model_var_type: how the reverse variance is had.
        loss_type: what `training_losses` returns.
        process: arguments of `ForwardProcess`.
    """

    def __init__(
        self,
        *,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        **process: Any,
    ):
        super().__init__(**process)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type

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
    ) -> Prediction:
        """The reverse step's Gaussian for a given model output.

        Args:
            model_output: [B, 3, H, W], or [B, 6, H, W] when the variance is learned.
            x: x_t, [B, 3, H, W].
            t: int64 [B].
            clip_denoised: clip the predicted x_0 to [-1, 1]; a bool [B] says so per sample.
            denoised_fn: applied to the predicted x_0 before clipping.

        Raises:
            ValueError: the output has a wrong number of channels.
        """
        prediction, values = self._split(model_output, x.shape[1])
        log_variance = self._log_variance(values, t).expand_as(x)
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            variance = self.at("posterior_variance", t).expand_as(x)  # 0 at t = 0; its log is clipped
        else:
            variance = log_variance.exp()

        if self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = self.predict_xstart_from_eps(x, t, prediction)
        else:
            pred_xstart = prediction
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if isinstance(clip_denoised, th.Tensor):
            mask = clip_denoised.reshape(-1, 1, 1, 1)
            pred_xstart = th.where(mask, pred_xstart.clamp(-1, 1), pred_xstart)
        elif clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)

        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return Prediction(
            mean=mean,
            variance=variance,
            log_variance=log_variance,
            pred_xstart=pred_xstart,
        )

    def _split(self, model_output: th.Tensor, channels: int) -> tuple[th.Tensor, th.Tensor | None]:
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        expected = 2 * channels if learned else channels
        if model_output.shape[1] != expected:
            raise ValueError(
                f"the model gives {model_output.shape[1]} channels, this process needs {expected} "
                f"(learned variance: {learned})"
            )
        return (model_output[:, :channels], model_output[:, channels:]) if learned else (model_output, None)

    def _log_variance(self, values: th.Tensor | None, t: th.Tensor) -> th.Tensor:
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            return self.at("_fixed_large_log_variance", t)
        smallest = self.at("posterior_log_variance_clipped", t)
        if values is None:
            return smallest
        # Improved DDPM eq. 15: v in [-1, 1] interpolates between the two bounds in the log domain.
        fraction = (values + 1) / 2
        return fraction * self.at("_log_betas", t) + (1 - fraction) * smallest

    def p_jump(
        self, model_output: th.Tensor, x: th.Tensor, t: th.Tensor, s: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """Mean and log variance of p(x_s | x_t) for any earlier step s < t of this process.

        The reverse step of the process that keeps only s and t (Improved DDPM section 4, respacing,
        per sample instead of per process), the predicted x_0 clipped to [-1, 1].

        Args:
            model_output: as in `p_distribution`.
            x: x_t, [B, 3, H, W].
            t, s: int64 [B], 0 <= s < t; with s = t - 1 this is `p_distribution`.

        Returns:
            [B, 3, H, W] each.
        """
        prediction, values = self._split(model_output, x.shape[1])
        alpha_bar = th.from_numpy(self.alphas_cumprod).to(t.device)
        bar_t, bar_s = (alpha_bar[i].reshape(-1, 1, 1, 1) for i in (t, s))
        beta = 1 - bar_t / bar_s
        smallest = (beta * (1 - bar_s) / (1 - bar_t)).log().float()
        largest = beta.log().float()
        fraction: th.Tensor | float = {
            ModelVarType.FIXED_LARGE: 1.0,
            ModelVarType.FIXED_SMALL: 0.0,
        }.get(self.model_var_type, 0.0)
        if values is not None:
            fraction = (values + 1) / 2
        log_variance = fraction * largest + (1 - fraction) * smallest

        if self.model_mean_type is ModelMeanType.EPSILON:
            prediction = self.predict_xstart_from_eps(x, t, prediction)
        coef_start = (bar_s.sqrt() * beta / (1 - bar_t)).float()
        coef_x = ((1 - bar_s) * (1 - beta).sqrt() / (1 - bar_t)).float()
        mean = coef_start * prediction.clamp(-1, 1) + coef_x * x
        return mean, log_variance.expand_as(mean)

    def predict_xstart_from_eps(self, x_t: th.Tensor, t: th.Tensor, eps: th.Tensor) -> th.Tensor:
        """x_0 = x_t / sqrt(abar) - eps sqrt(1 / abar - 1), DDPM eq. 4 solved for x_0."""
        return self.at("sqrt_recip_alphas_cumprod", t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t) * eps

    def predict_eps_from_xstart(self, x_t: th.Tensor, t: th.Tensor, pred_xstart: th.Tensor) -> th.Tensor:
        """The inverse of `predict_xstart_from_eps`."""
        return (self.at("sqrt_recip_alphas_cumprod", t) * x_t - pred_xstart) / self.at(
            "sqrt_recipm1_alphas_cumprod", t
        )

    def vb_terms_bpd(
        self,
        model_output: th.Tensor,
        x_start: th.Tensor,
        x_t: th.Tensor,
        t: th.Tensor,
        clip_denoised: bool = True,
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
    ) -> dict[str, th.Tensor]:
        """The loss terms of one batch (Improved DDPM section 3.1: L_hybrid).

        Args:
            model: called as model(x_t, timesteps, **model_kwargs).
            x_start: [B, 3, H, W] in [-1, 1].
            t: int64 [B].
            model_kwargs: further arguments of the model.
            noise: the epsilon of q_sample; drawn when left out.

        Returns:
            "loss" [B]; with an MSE loss also "mse", and "vb" (bits/dim, its gradient reaching only
            the variance) when the variance is learned.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_vb:
            loss, _ = self.vb_terms_bpd(output, x_start, x_t, t, clip_denoised=False)
            return {"loss": loss * (self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1)}

        terms = {}
        prediction, values = self._split(output, x_start.shape[1])
        if values is not None:
            frozen = th.cat([prediction.detach(), values], dim=1)
            terms["vb"] = self.vb_weight * self.vb_terms_bpd(frozen, x_start, x_t, t, False)[0]
        target = noise if self.model_mean_type is ModelMeanType.EPSILON else x_start
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    @property
    def vb_weight(self) -> float:
        """Weight of the bound beside the MSE: T/1000 with rescaled sigmas, else 1."""
        return self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1.0

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
            x_start: [B, 3, H, W] in [-1, 1].
            clip_denoised: clip the predicted x_0 to [-1, 1].
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
