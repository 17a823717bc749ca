"""What a training loop minimises: distillation (TCCD, DKDM) or plain diffusion training.

An objective is a module holding whatever is trained beside the network and never sampled from. The loop
asks it for the losses of one batch, pass by pass, and runs each pass's backward before the next is built.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch as th
from torch import nn

from .. import dist_util
from ..config.settings import Distill
from ..gaussian_diffusion import GaussianDiffusion
from ..losses import contrastive_loss, normal_kl
from ..networks.noise_encoder import NoiseEncoder
from ..nn import mean_flat
from ..resample import ScheduleSampler
from ..unet import UNetModel
from .dynamic_batch import DistillationBatch


@dataclass(frozen=True)
class PassLoss:
    """The losses of one forward pass.

    Attributes:
        loss: [B], what is minimised in the mean.
        terms: named parts of it for the log, [B] each.
        t: int64 [B], the steps they belong to.
    """

    loss: th.Tensor
    terms: dict[str, th.Tensor]
    t: th.Tensor


class Objective(Protocol):
    """What the training loop needs of an objective; its module's parameters are trained too."""

    def passes(self, model: UNetModel, batch: Any) -> Iterator[PassLoss]:
        """Yield the losses of a (micro)batch, one forward pass at a time."""
        ...


class Distillation(nn.Module):
    """TCCD: DKDM's loss plus timestep-noise alignment (stage 1) and self-supervision (stage 2).

    With both weights 0 this is DKDM, and nothing is built or computed for the stages.

    Args:
        model: the student, whose sizes the heads take.
        diffusion: the process that teacher and student share.
        settings: weights and options.
        clip_last: clip the student's predicted x_0 inside the KL at t = T-1, where the cosine
            schedule otherwise makes it huge.
        input_perturb: gamma >= 0; the student's input gets gamma sqrt(1 - abar_t) further noise.
    """

    def __init__(
        self,
        model: UNetModel,
        diffusion: GaussianDiffusion,
        settings: Distill,
        *,
        clip_last: bool = False,
        input_perturb: float = 0.0,
    ):
        super().__init__()
        self.diffusion = diffusion
        self.settings = settings
        self.clip_last = clip_last
        self.input_perturb = input_perturb
        self.noise_encoder: NoiseEncoder | None = None
        self.role: nn.Parameter | None = None
        if settings.stage1_weight > 0:
            self.noise_encoder = NoiseEncoder(model.feature_channels, model.emb_channels, model.image_size)
        if settings.stage2_weight > 0 and settings.role_vector:
            self.role = nn.Parameter(th.randn(model.emb_channels))

    def passes(self, model: UNetModel, batch: DistillationBatch) -> Iterator[PassLoss]:
        """Stage 1 (or DKDM's only pass), then stage 2. Each yields terms "mse", "vb" and "align"."""
        yield self.stage1(model, batch)
        if self.settings.stage2_weight > 0:
            yield self.stage2(model, batch)

    def stage1(self, model: UNetModel, batch: DistillationBatch) -> PassLoss:
        """The student at (x_t, t): MSE + KL, plus the weighted alignment of h with the timestep."""
        x_in = batch.x_t
        if self.input_perturb > 0:
            scale = self.diffusion.at("sqrt_one_minus_alphas_cumprod", batch.t)
            x_in = x_in + self.input_perturb * scale * th.randn_like(x_in)
        emb = model.embed_timesteps(self.diffusion.model_timesteps(batch.t))  # e [B, D]
        h = model.features(x_in, emb, batch.y)  # [B, C, H, W]
        terms = self.distillation_terms(model.predict(h), batch)
        loss = th.stack(list(terms.values())).sum(0)
        if self.settings.stage1_weight > 0:
            terms["align"] = self.alignment(h, emb, batch.t).expand_as(loss)
            loss = loss + self.settings.stage1_weight * terms["align"]
        return PassLoss(loss, {f"stage1_{k}": v for k, v in terms.items()}, batch.t)

    def stage2(self, model: UNetModel, batch: DistillationBatch) -> PassLoss:
        """The student at (eps_T, t), the teacher's noise prediction being both input and target.

        The role vector tells the network "this is a noise prediction", which it cannot see from
        eps_T alone; without it sampling learns to hand noise back.
        """
        emb = model.embed_timesteps(self.diffusion.model_timesteps(batch.t))
        marked = emb if self.role is None else emb + self.role
        h = model.features(batch.eps, marked, batch.y)
        terms = self.distillation_terms(model.predict(h), batch)
        loss = th.stack(list(terms.values())).sum(0)
        if self.settings.stage2_align:
            terms["align"] = self.alignment(h, emb, batch.t).expand_as(loss)
            loss = loss + self.settings.stage1_weight * terms["align"]
        loss = self.settings.stage2_weight * loss
        return PassLoss(loss, {f"stage2_{k}": v for k, v in terms.items()}, batch.t)

    def distillation_terms(self, output: th.Tensor, batch: DistillationBatch) -> dict[str, th.Tensor]:
        """DKDM's loss for a student output: "mse" of eps, and the "vb" KL in bits/dim, [B] each.

        KL(teacher's reverse step || student's), the student's eps detached, so that the KL trains the
        variance alone; absent when the student's variance is fixed. Unlike the bound of plain
        training it is used at t = 0 too.
        """
        channels = batch.x_t.shape[1]
        eps, values = output[:, :channels], output[:, channels:]
        terms = {"mse": mean_flat((batch.eps - eps) ** 2)}
        if values.shape[1]:
            frozen = th.cat([eps.detach(), values], dim=1)
            clip: bool | th.Tensor = False
            if self.clip_last:
                clip = batch.t == self.diffusion.num_timesteps - 1
            student = self.diffusion.p_distribution(frozen, batch.x_t, batch.t, clip_denoised=clip)
            kl = normal_kl(batch.mean, batch.log_variance, student["mean"], student["log_variance"])
            terms["vb"] = self.diffusion.vb_weight * mean_flat(kl) / math.log(2.0)
        return terms

    def alignment(self, h: th.Tensor, emb: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The contrastive loss of a pass, scalar.

        Its negatives are the other samples of this (micro)batch and rank, as published; with
        `gather_negatives` those of all ranks.
        """
        assert self.noise_encoder is not None
        z = self.noise_encoder(h)
        if self.settings.gather_negatives:
            z, emb = dist_util.all_gather_with_grad(z), dist_util.all_gather_with_grad(emb)
            t = dist_util.all_gather(t)
        return contrastive_loss(
            z,
            emb,
            temperature=self.settings.temperature,
            normalize=self.settings.normalize,
            share_equal=t if self.settings.share_equal_timesteps else None,
        )


@dataclass(frozen=True)
class ImageBatch:
    """Images float32 [B, 3, H, W] in [-1, 1], and class labels int64 [B] or None."""

    x_start: th.Tensor
    y: th.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_start)

    def split(self, size: int) -> Iterator["ImageBatch"]:
        """Yield consecutive pieces of at most `size` images."""
        for start in range(0, len(self), size):
            y = None if self.y is None else self.y[start : start + size]
            yield ImageBatch(self.x_start[start : start + size], y)


class DiffusionTraining(nn.Module):
    """Plain training on images: `ReverseProcess.training_losses` at drawn timesteps.

    Args:
        diffusion: the process.
        sampler: draws the timesteps.
    """

    def __init__(self, diffusion: GaussianDiffusion, sampler: ScheduleSampler):
        super().__init__()
        self.diffusion = diffusion
        self.sampler = sampler

    def passes(self, model: UNetModel, batch: ImageBatch) -> Iterator[PassLoss]:
        """The only pass; its terms are those of `training_losses`."""
        t, weights = self.sampler.sample(len(batch), batch.x_start.device)
        labels = {} if batch.y is None else {"y": batch.y}
        terms = self.diffusion.training_losses(model, batch.x_start, t, model_kwargs=labels)
        loss = terms.pop("loss")
        self.sampler.update_with_losses(t, loss)
        yield PassLoss(loss * weights, terms, t)
