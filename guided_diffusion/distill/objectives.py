"""The objectives of distillation: TCCD, and DKDM with both stages off."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from torch import nn

from .. import dist_util
from ..config.settings import Distill
from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from ..losses import contrastive_loss, normal_kl
from ..networks.base import DenoisingNetwork, Evaluation
from ..networks.noise_encoder import NoiseEncoder
from ..networks.weight_selection import bottleneck_channels
from ..nn import mean_flat
from ..runs.weights import load_strictly
from ..training.objective import Objective, PassLoss
from .dynamic_batch import DistillationBatch
from .teacher import Teacher


@dataclass(frozen=True)
class _Call:
    """What a stage applies the student to: x [B, C, H, W], t int64 [B], labels, and role [D] or [B, D]."""

    x: th.Tensor
    t: th.Tensor
    y: th.Tensor | None
    role: th.Tensor | None = None

    def of(self, student: DenoisingNetwork, process: GaussianDiffusion) -> Evaluation:
        """The student's evaluation."""
        return student.evaluate(self.x, process.model_timesteps(self.t), self.y, emb_shift=self.role)

    def joined(self, other: "_Call") -> "_Call":
        """Both batches as one, this one without a role."""
        role = None
        if other.role is not None:
            plain = other.role.new_zeros(len(self.x), len(other.role))
            role = th.cat([plain, other.role.expand(len(other.x), -1)])
        y = None if self.y is None or other.y is None else th.cat([self.y, other.y])
        return _Call(th.cat([self.x, other.x]), th.cat([self.t, other.t]), y, role)


class Distillation(Objective):
    """TCCD: DKDM's loss plus timestep-noise alignment (stage 1) and self-supervision (stage 2).

    With both weights 0 this is DKDM, and nothing is built or computed for the stages.

    Args:
        student: the student, whose sizes the heads take.
        process: the student's process.
        settings: weights and options, an instance of the class's `Settings`.
        clip_last: clip the student's predicted x_0 inside the KL at t = T-1, where the cosine
            schedule otherwise makes it huge.
        input_perturb: gamma >= 0; what the student takes for x_t gets gamma sqrt(1 - abar_t) further noise.
        teacher: the teacher, for its bottleneck and for subclasses whose heads take its sizes.

    Attributes:
        needs_teacher_features, needs_teacher_bottleneck: whether batches must carry these maps.
        follow: told the student's prediction at each batch's x_t, if not None.

    Raises:
        UserError: bottlenecks are to be matched, and one network is no U-Net, or the student's is the wider.
    """

    Settings: type[Distill] = Distill
    needs_teacher_features = False
    needs_teacher_bottleneck = False

    loss_weight: th.Tensor
    bottleneck_channels: th.Tensor

    def __init__(
        self,
        student: DenoisingNetwork,
        process: GaussianDiffusion,
        settings: Distill,
        *,
        clip_last: bool = False,
        input_perturb: float = 0.0,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.process, self.settings = process, settings
        self.clip_last, self.input_perturb = clip_last, input_perturb
        self.follow: Callable[[DistillationBatch, th.Tensor], None] | None = None
        self.register_buffer("loss_weight", loss_weight(process, settings), persistent=False)
        self.noise_encoder: NoiseEncoder | None = None
        self.role: nn.Parameter | None = None
        if settings.bottleneck_weight > 0:
            assert teacher is not None
            self.needs_teacher_bottleneck = True
            try:
                channels = bottleneck_channels(
                    teacher.network.selectable_weights(), student.selectable_weights()
                )
            except ValueError as error:
                raise UserError(f"distill.bottleneck_weight: {error}; give 0") from None
            self.register_buffer("bottleneck_channels", channels, persistent=False)
        if settings.stage1_weight > 0:
            self.noise_encoder = NoiseEncoder(student.feature_shape, student.emb_dim)
        if settings.stage2_weight > 0 and settings.role_vector:
            self.role = nn.Parameter(th.randn(student.emb_dim))

    @property
    def teacher_maps(self) -> dict[str, bool]:
        """Which maps of the teacher's batches must carry, by their names in `DistillationBatch`."""
        return {"features": self.needs_teacher_features, "bottleneck": self.needs_teacher_bottleneck}

    @property
    def capturable(self) -> bool:
        """Unless the pool follows the student, or ranks exchange what they compute."""
        among_ranks = self.settings.gather_negatives and dist_util.world_size() > 1
        return type(self) is Distillation and self.follow is None and not among_ranks

    def passes(self, student: DenoisingNetwork, batch: DistillationBatch) -> Iterator[PassLoss]:
        """Stage 1 (or DKDM's only pass), then stage 2; their terms are "stage1_mse", "stage2_vb" and so on.

        Where stage 2 sees a share of the batch, one pass takes both: a small one of its own would cost nearly
        as much time as a large one. The share is of the iteration's batch, whose first samples it is: a
        microbatch holds some of them, or none.
        """
        first, whole = batch.place or (0, len(batch))
        share = share_of(self.settings.stage2_fraction, whole)
        count = min(max(share - first, 0), len(batch))
        if self.settings.stage2_weight == 0 or not count:
            yield self.stage1(student, batch)
        elif share == whole:
            yield self.stage1(student, batch)
            yield self.stage2(student, batch)
        else:
            yield self.together(student, batch, count, count / len(batch) * whole / share)

    def stage1(self, student: DenoisingNetwork, batch: DistillationBatch) -> PassLoss:
        """The student at (x_t, t): MSE + KL, plus the weighted alignment of h with the timestep."""
        call = self.stage1_call(batch)
        return self.stage1_loss(call, call.of(student, self.process), batch)

    def stage2(self, student: DenoisingNetwork, batch: DistillationBatch) -> PassLoss:
        """The student at (eps_T, t), the teacher's noise prediction being both input and target.

        The role vector tells the network "this is a noise prediction", which it cannot see from
        eps_T alone; without it sampling learns to hand noise back.

        With `stage2_time: between` the input is a state that has this noise and the label that says so,
        x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps_T with the teacher's x_0 and s uniform in {t..T-1},
        and "mse" at s is the only term: the teacher's variance there is not known.
        """
        call = self.stage2_call(batch)
        return self.stage2_loss(call, call.of(student, self.process), batch)

    def together(
        self, student: DenoisingNetwork, batch: DistillationBatch, count: int, weight: float
    ) -> PassLoss:
        """Stage 1 on a batch and stage 2 on its first `count` samples, in one pass.

        The loss is the sum of their means, the latter times `weight`, which is 1 but for microbatches.
        """
        part = batch[:count]
        first, second = self.stage1_call(batch), self.stage2_call(part)
        out = first.joined(second).of(student, self.process)
        n = len(batch)
        one = self.stage1_loss(first, out[:n], batch)
        two = self.stage2_loss(second, out[n:], part)
        return PassLoss(one.loss + weight * two.loss.mean(), {}, one.t, (one, two))

    def stage1_call(self, batch: DistillationBatch) -> "_Call":
        """What stage 1 applies the student to."""
        return _Call(self.perturbed(batch), batch.t, batch.y)

    def stage1_loss(self, call: "_Call", out: Evaluation, batch: DistillationBatch) -> PassLoss:
        """Stage 1's losses of what the student made of it."""
        terms = self.distillation_terms(out.output, batch, x_in=call.x, x_t=call.x)
        if self.follow is not None and batch.index is not None:
            self.follow(batch, self.process.eps_of(out.output, batch.x_t, batch.t).detach())
        found = self._weighted("stage1", 1.0, self.noise_encoder is not None, terms, out, batch.t)
        if not self.needs_teacher_bottleneck:
            return found
        distance = self.bottleneck_distance(out, batch)
        loss = found.loss + self.settings.bottleneck_weight * distance
        return PassLoss(loss, found.terms | {"stage1_bottleneck": distance}, found.t)

    def stage2_call(self, batch: DistillationBatch) -> "_Call":
        """What stage 2 applies the student to."""
        between = self.settings.stage2_time == "between"
        s, x_in = self.between(batch) if between else (batch.t, batch.eps)
        return _Call(x_in, s, batch.y, self.role)

    def stage2_loss(self, call: "_Call", out: Evaluation, batch: DistillationBatch) -> PassLoss:
        """Stage 2's losses of what the student made of it."""
        settings = self.settings
        if settings.stage2_time == "between":
            eps = self.process.eps_of(out.output, call.x, call.t)
            terms = {"mse": self.squared_error(eps, batch.eps, call.t)}
        else:
            terms = self.distillation_terms(out.output, batch, x_in=call.x, x_t=self.perturbed(batch))
        return self._weighted("stage2", settings.stage2_weight, settings.stage2_align, terms, out, call.t)

    def between(self, batch: DistillationBatch) -> tuple[th.Tensor, th.Tensor]:
        """Random steps s int64 [B] in {t..T-1}, and the states x_s [B, C, H, W] of noise eps_T there."""
        process, t = self.process, batch.t
        later = (th.rand(len(t), device=t.device) * (process.num_timesteps - t)).long()
        s = (t + later).clamp(max=process.num_timesteps - 1)
        x_s = process.q_sample(process.clipped_xstart(batch.x_t, t, batch.eps), s, batch.eps)
        return s, process.where_known(t, x_s, batch.eps)

    def squared_error(self, eps: th.Tensor, target: th.Tensor, t: th.Tensor) -> th.Tensor:
        """Mean squared difference of noise predictions at steps t, weighted by `loss_weight`: [B]."""
        return self.loss_weight[t] * mean_flat((target - eps) ** 2)

    def bottleneck_distance(self, out: Evaluation, batch: DistillationBatch) -> th.Tensor:
        """How far the student's bottleneck is from the teacher's at the same state, [B].

        The squared distance from the channels that the student's would be selected from (`initial_weights`),
        relative to their square: a hint (FitNets, Romero et al., 2015) without a projection to train.

        Raises:
            UserError: a network of another's hands none out.
        """
        if out.bottleneck is None or batch.bottleneck is None:
            raise UserError("distill.bottleneck_weight: a network hands out no bottleneck; give 0")
        theirs = batch.bottleneck[:, self.bottleneck_channels]
        return mean_flat((out.bottleneck - theirs) ** 2) / mean_flat(theirs**2).clamp(min=1e-12)

    def _weighted(
        self,
        stage: str,
        weight: float,
        align: bool,
        terms: dict[str, th.Tensor],
        out: Evaluation,
        t: th.Tensor,
    ) -> PassLoss:
        """A stage's loss: its weight times the sum of its terms and, with `align`, the weighted alignment."""
        loss = th.stack(list(terms.values())).sum(0)
        if align:
            n = share_of(self.settings.stage1_fraction, len(t))
            terms["align"] = self.alignment(out.features[:n], out.emb[:n]).expand_as(loss)
            loss = loss + self.settings.stage1_weight * terms["align"]
        return PassLoss(weight * loss, {f"{stage}_{k}": v for k, v in terms.items()}, t)

    def perturbed(self, batch: DistillationBatch) -> th.Tensor:
        """What the student takes for x_t, [B, C, H, W]; its further noise is drawn anew at every call."""
        if self.input_perturb == 0:
            return batch.x_t
        scale = self.process.at("sqrt_one_minus_alphas_cumprod", batch.t)
        return batch.x_t + self.input_perturb * scale * th.randn_like(batch.x_t)

    def distillation_terms(
        self, output: th.Tensor, batch: DistillationBatch, *, x_in: th.Tensor, x_t: th.Tensor
    ) -> dict[str, th.Tensor]:
        """DKDM's loss for a student output: (weighted) "mse" of eps, and the "vb" KL in bits/dim, [B] each.

        KL(teacher's reverse step || student's), the student's prediction detached, so that the KL trains the
        variance alone; absent when the student's variance is fixed. Unlike the bound of plain
        training it is used at t = 0 too.

        Args:
            output: the student's, [B, C or 2C, H, W].
            batch: the batch.
            x_in: what the student was applied to, [B, C, H, W].
            x_t: where its reverse step inside the KL is taken, [B, C, H, W].
        """
        prediction, values = self.process.split(output, x_t.shape[1])
        eps = self.process.predict_eps(x_in, batch.t, prediction)
        terms = {"mse": self.squared_error(eps, batch.eps, batch.t)}
        if values is not None:
            frozen = th.cat([prediction.detach(), values], dim=1)
            clip = batch.t == self.process.num_timesteps - 1 if self.clip_last else False

            def of_eps(own: th.Tensor) -> th.Tensor:
                found = self.process.predict_xstart_from_eps(x_t, batch.t, eps.detach())
                return self.process.where_known(batch.t, found, own)

            student = self.process.p_distribution(
                frozen,
                x_t,
                batch.t,
                clip_denoised=clip,
                # Made at x_in, a prediction of x_0 or v would be of another eps at x_t.
                denoised_fn=None if x_in is x_t else of_eps,
            )
            kl = normal_kl(batch.mean, batch.log_variance, student["mean"], student["log_variance"])
            terms["vb"] = self.process.vb_weight * mean_flat(kl) / math.log(2.0)
        return terms

    def alignment(self, h: th.Tensor, emb: th.Tensor) -> th.Tensor:
        """The contrastive loss of a pass, scalar.

        Its negatives are the other samples of this (micro)batch and rank, as published; with
        `gather_negatives` those of all ranks.
        """
        assert self.noise_encoder is not None
        z = self.noise_encoder(h)
        if self.settings.gather_negatives:
            z, emb = dist_util.all_gather_with_grad(z), dist_util.all_gather_with_grad(emb)
        return contrastive_loss(
            z, emb, temperature=self.settings.temperature, normalize=self.settings.normalize
        )

    def load_foreign_head(self, state: Mapping[str, th.Tensor], origin: Any) -> None:
        """Take up an original's noise encoder if stage 1 is on."""
        if self.noise_encoder is not None:
            load_strictly(self.noise_encoder, state, origin)

    def describe(self) -> str:
        """Which method this is, and the weights of its stages."""
        settings = self.settings
        name = "DKDM (both stages off"
        if settings.stage1_weight or settings.stage2_weight:
            name = f"TCCD (stage 1 x {settings.stage1_weight:g}, stage 2 x {settings.stage2_weight:g}"
        options = {
            "role vector": self.role is not None,
            "stage 2 between t and T": settings.stage2_weight > 0 and settings.stage2_time == "between",
            f"loss weight {settings.loss_weight}": settings.loss_weight != "eps",
            f"hops of {settings.advance_stride}": settings.advance_stride > 1,
            f"the teacher every {settings.teacher_interval} iterations": settings.teacher_interval > 1,
            f"on-policy {settings.on_policy:g}": settings.on_policy > 0,
            f"bottleneck x {settings.bottleneck_weight:g}": settings.bottleneck_weight > 0,
        }
        return ", ".join([name, *(option for option, used in options.items() if used)]) + ")"


def loss_weight(process: GaussianDiffusion, settings: Distill) -> th.Tensor:
    """The weight of the squared error of eps at each step, float32 [T], 1 in the mean.

    "v": 1 / abar_t, which makes it the squared error of v (Salimans & Ho, 2022, appendix D), at most
    `loss_weight_cap`. "min_snr": min(snr_t, gamma) / snr_t with snr_t = abar_t / (1 - abar_t) and gamma =
    `loss_weight_cap` (Hang et al., 2023). "eps": 1.
    """
    bars, cap = process.alphas_cumprod, settings.loss_weight_cap
    with np.errstate(divide="ignore"):  # abar_t may be 0 where all is noise
        if settings.loss_weight == "v":
            weight = np.minimum(1 / bars, cap)
        elif settings.loss_weight == "min_snr":
            weight = np.minimum(1, cap * (1 - bars) / bars)
        else:
            weight = np.ones_like(bars)
    return th.from_numpy(weight / weight.mean()).float()


def share_of(fraction: float, count: int) -> int:
    """How many of `count` samples a share is, rounded up; 0.07 of 100 are 7, whatever floats make of it."""
    return max(1, math.ceil(round(fraction * count, 6)))
