"""The training loop: source of batches -> objective -> optimizer -> record. One loop for every objective."""

import dataclasses
import os
import time
from typing import Any

import numpy as np
import torch as th

from . import dist_util
from .checkpoint import (
    Checkpoint,
    complete_checkpoints,
    drop_file,
    load_file,
    load_network,
    load_strictly,
    save_checkpoint,
)
from .ema import Ema
from .errors import UserError
from .figures import save_grid
from .gaussian_diffusion import GaussianDiffusion
from .logger import RunLog, progress_bar
from .metrics import Metrics
from .objectives import Objective
from .sampling import sample_images
from .script_util import build_process
from .settings import Run, Student
from .sources import Source
from .unet import UNetModel


def reseed(seed: int, rank: int, step: int) -> None:
    """Make everything random in a step a function of (seed, rank, step), so that a resumed run draws
    what the uninterrupted one would have.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(2, np.uint32)
    th.manual_seed(int(state[0]) << 32 | int(state[1]))


def compute_dtype(precision: str, use_fp16: bool, device: th.device) -> th.dtype:
    """The dtype of `run.precision` on a device.

    "auto" is float32, except with the configurations' old `use_fp16: true` on a GPU, which then takes
    bfloat16 where the GPU has it and float16 where not.
    """
    if precision != "auto":
        return {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}[precision]
    if not use_fp16 or device.type != "cuda":
        return th.float32
    return th.bfloat16 if th.cuda.is_bf16_supported() else th.float16


class TrainLoop:
    """Trains a network and whatever its objective holds.

    Args:
        model: the network, on the device.
        objective: what is minimised, on the device.
        source: this rank's batches.
        diffusion: the process; its T splits the log by quartiles, and grids are sampled from it.
        sample_diffusion: the respaced process for grids of samples; None for none.
        student: how to train.
        run: how to run.
        log: the record.
        resume: continue from this checkpoint.

    Attributes:
        step: iterations done.
    """

    def __init__(
        self,
        *,
        model: UNetModel,
        objective: Objective,
        source: Source,
        diffusion: GaussianDiffusion,
        sample_diffusion: GaussianDiffusion | None = None,
        student: Student,
        run: Run,
        log: RunLog,
        resume: Checkpoint | None = None,
    ):
        self.model, self.objective, self.source = model, objective, source
        self.diffusion, self.sample_diffusion = diffusion, sample_diffusion
        self.student, self.run_settings, self.log = student, run, log
        self.iterations = run.iterations or student.lr_anneal_steps
        self.step = 0
        assert isinstance(objective, th.nn.Module)
        self.head = objective
        self.parameters = [*model.parameters(), *objective.parameters()]
        self.emas = {rate: Ema(model, rate) for rate in student.ema_rates}
        self.optimizer = th.optim.AdamW(self.parameters, lr=student.lr, weight_decay=student.weight_decay)
        # The originals' rule: log2 of the scale grows by fp16_scale_growth each iteration.
        self.scaler = th.amp.GradScaler(
            dist_util.dev().type,
            init_scale=2.0**20,
            growth_factor=2.0**student.fp16_scale_growth,
            growth_interval=1,
            enabled=model.compute_dtype == th.float16,
        )
        self.metrics = Metrics()
        if resume is not None:
            self._load(resume)
        dist_util.sync_params([*self.parameters, *(a for ema in self.emas.values() for a in ema.average)])
        self._set_lr()

    def run(self) -> None:
        """Train until the last iteration, then save."""
        self.model.train()
        self.head.train()
        started, step_at_start = time.monotonic(), self.step
        saved = self.step if self.step else -1
        bar = progress_bar(
            self.iterations or None, "training", initial=self.step, active=dist_util.rank() == 0
        )
        while not self.iterations or self.step < self.iterations:
            reseed(self.run_settings.seed, dist_util.rank(), self.step)
            self.train_step(self.source.next_batch())
            bar.update()
            if self.step % self.student.log_interval == 0 or self.step == self.iterations:
                rate = (self.step - step_at_start) / (time.monotonic() - started)
                self._log(rate)
            if self.step % self.student.save_interval == 0:
                self.save()
                saved = self.step
            if self._samples_due():
                self.save_samples()
        bar.close()
        if saved != self.step:
            self.save()
            if self.run_settings.sample_interval == 0:
                self.save_samples()

    def train_step(self, batch: Any) -> None:
        """One iteration: every pass's backward, one optimizer step, EMA, learning rate.

        Microbatches give the gradient of the whole batch, each counting by its share; only the
        contrastive term differs, since it sees no more than its own microbatch's negatives.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = self.student.microbatch if self.student.microbatch > 0 else len(batch)
        for micro in batch.split(size):
            total: th.Tensor | float = 0.0
            for out in self.objective.passes(self.model, micro):
                self.scaler.scale(out.loss.mean() * (len(micro) / len(batch))).backward()
                self.metrics.add_pass(out, self.diffusion.num_timesteps)
                total = total + out.loss.detach()
            assert isinstance(total, th.Tensor)
            self.metrics.add("loss", total)
        dist_util.average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norms = th._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        self.metrics.add("grad_norm", th.stack(norms).norm())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for ema in self.emas.values():
            ema.update()
        self.step += 1
        self._set_lr()

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        write = self.source.writer()
        if dist_util.rank() == 0:
            contents: dict[str, Any] = {"model": self.model.state_dict()}
            contents |= {f"ema_{rate}": ema.state_dict() for rate, ema in self.emas.items()}
            contents["opt"] = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            contents["head"] = self.head.state_dict()
            if write is not None:
                contents["pool"] = write
            save_checkpoint(self.log.directory, self.step, contents)
            self._drop_old_pools()
            self.log.info(f"saved step {self.step} to {self.log.directory}")
        dist_util.barrier()

    def save_samples(self) -> None:
        """Draw a grid of samples with the last EMA's weights, on rank 0."""
        if self.sample_diffusion is None or self.run_settings.sample_interval < 0:
            return
        if dist_util.rank() == 0:
            ema = list(self.emas.values())[-1] if self.emas else None
            if ema:
                ema.swap()
            indices = range(self.run_settings.num_samples)
            images, _ = sample_images(self.model, self.sample_diffusion, indices, seed=self.run_settings.seed)
            if ema:
                ema.swap()
            save_grid(self.log.directory / f"samples{self.step:06d}.png", images)
        dist_util.barrier()

    def _samples_due(self) -> bool:
        interval = self.run_settings.sample_interval or self.student.save_interval
        return interval > 0 and self.step % interval == 0

    def _drop_old_pools(self) -> None:
        """Keep the pools of the newest two checkpoints, and those that `cache_save_interval` asks for.

        Pools are far larger than networks; two, so that a run whose newest checkpoint is damaged still
        resumes exactly from the one before.
        """
        keep = self.student.cache_save_interval
        for checkpoint in complete_checkpoints(self.log.directory)[:-2]:
            if keep < 1 or checkpoint.step % keep:
                drop_file(checkpoint, "pool")

    def _set_lr(self) -> None:
        """The next iteration's learning rate: linear warm-up times ADM's linear annealing.

        ADM lowers the rate after each step by the steps done before it, so it lags one step behind.
        """
        factor = 1.0
        if self.student.lr_anneal_steps:
            factor = max(0.0, 1 - max(0, self.step - 1) / self.student.lr_anneal_steps)
        if self.run_settings.warmup_steps:
            factor *= min(1.0, (self.step + 1) / self.run_settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.student.lr * factor

    def _log(self, rate: float) -> None:
        values = self.metrics.read()
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["samples"] = float(self.step * self.student.batch_size)
        values["iterations_per_second"] = rate
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        shown = {k: v for k, v in values.items() if k[-2:] not in ("q0", "q1", "q2", "q3")}
        shown.pop("samples")
        shown.pop("iterations_per_second")
        of = f"/{self.iterations}" if self.iterations else ""
        parts = [f"{name} {value:.4g}" for name, value in shown.items()]
        self.log.info(f"step {self.step}{of}: {', '.join(parts)} ({rate:.2f} it/s)")
        self.log.row(self.step, values)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint; an original's may lack parts, which then start anew and are named."""
        head = load_network(self.model, checkpoint.path("model"))
        for rate, ema in self.emas.items():
            name = f"ema_{rate}"
            if checkpoint.has(name):
                own = {k: v.clone() for k, v in self.model.state_dict().items()}
                load_network(self.model, checkpoint.path(name))
                ema.load_state_dict(self.model.state_dict())
                self.model.load_state_dict(own)
            else:
                ema.load_state_dict(self.model.state_dict())
        if checkpoint.has("head"):
            load_strictly(self.head, load_file(checkpoint.path("head")), checkpoint.path("head"))
        elif head and isinstance(encoder := getattr(self.head, "noise_encoder", None), th.nn.Module):
            load_strictly(encoder, head, checkpoint.path("model"))
        if checkpoint.has("opt"):
            self._load_optimizer(checkpoint.path("opt"))
        expected = ["opt", "head", *(f"ema_{rate}" for rate in self.emas)]
        missing = [name for name in expected if not checkpoint.has(name)]
        self.step = checkpoint.step
        self.log.drop_rows_after(self.step)
        note = f" (not there, so started anew: {', '.join(missing)})" if missing else ""
        self.log.info(f"resumed from step {self.step} of {checkpoint.directory}{note}")

    def _load_optimizer(self, path: str | os.PathLike) -> None:
        state = load_file(path)
        try:
            if "optimizer" in state:
                self.scaler.load_state_dict(state["scaler"])
                state = state["optimizer"]
            self.optimizer.load_state_dict(state)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit the networks being trained ({error})") from None


def sample_process(student: Student, run: Run) -> GaussianDiffusion | None:
    """The respaced process that grids are sampled from while training; None if there are to be none."""
    if run.sample_interval < 0:
        return None
    steps = (
        min(student.diffusion_steps, int(run.sample_respacing)) if run.sample_respacing.isdigit() else None
    )
    respacing = run.sample_respacing if steps is None else str(steps)
    return build_process(dataclasses.replace(student, timestep_respacing=respacing), "run.sample_respacing")
