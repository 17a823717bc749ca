"""The training loop: source of batches -> objective -> optimizer -> record. One loop for every objective."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch as th

from . import dist_util
from .config.settings import Run, Training
from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion
from .io.files import write_text
from .io.progress import Progress
from .io.torch_file import read_torch_file
from .kernels.captured import Captured
from .logger import RunLog
from .networks.base import DenoisingNetwork
from .processes.stopping import Stopped, StopSignals
from .runs.checkpoint import Checkpoint, Retention, complete_checkpoints
from .runs.checkpoint_writer import CheckpointWriter
from .runs.weights import load_network, load_state_dict, load_strictly
from .training.ema import Ema
from .training.grids import Grids
from .training.metrics import Metrics
from .training.objective import Objective
from .training.optimizer import build_optimizer, load_optimizer_state
from .training.scoring import Scorer
from .training.sources import Source

DIVERGED = "gradients were not finite"  # how the message of a run begins that gives up


def describe(value: th.Tensor) -> str:
    """Shape, range and number of non-finite entries of a tensor, for a person."""
    finite = value[value.isfinite()].float()
    text = f"{list(value.shape)}, {value.numel() - len(finite)} non-finite"
    return f"{text}, {float(finite.min()):.4g} to {float(finite.max()):.4g}" if len(finite) else text


def reseed(seed: int, rank: int, step: int) -> None:
    """Make everything random in a step a function of (seed, rank, step), so that a resumed run draws
    what the uninterrupted one would have.
    """
    state = np.random.SeedSequence([seed, rank, step]).generate_state(2, np.uint32)
    th.manual_seed(int(state[0]) << 32 | int(state[1]))


class TrainLoop:
    """Trains a network and whatever its objective holds.

    Args:
        network: the network, on the device.
        objective: what is minimised, on the device.
        source: this rank's batches.
        process: its T splits the log by quartiles.
        training: how the network is optimised.
        run: how the run is carried out.
        log: the record.
        grids: draws grids of samples; None for none.
        scorer: scores the slowest average's weights; None for no scores.
        resume: continue from this checkpoint.
        description: what checkpoints say of the network, see `io.description.read_description`.

    Attributes:
        step: iterations done.
    """

    def __init__(
        self,
        *,
        network: DenoisingNetwork,
        objective: Objective,
        source: Source,
        process: GaussianDiffusion,
        training: Training,
        run: Run,
        log: RunLog,
        grids: Grids | None = None,
        scorer: Scorer | None = None,
        resume: Checkpoint | None = None,
        description: Mapping[str, Any] | None = None,
    ):
        self.network, self.objective, self.source = network, objective, source
        self.process, self.grids, self.scorer, self.resumed = process, grids, scorer, resume
        self.training, self.run_settings, self.log = training, run, log
        self.iterations = run.iterations or training.lr_anneal_steps
        self.step = 0
        self.parameters = [*network.parameters(), *objective.parameters()]
        self.emas = {rate: Ema(network, rate) for rate in training.ema_rates}
        self.optimizer = build_optimizer(training, run, network, objective)
        # The originals' rule: log2 of the scale grows by fp16_scale_growth each iteration.
        self.scaler = th.amp.GradScaler(
            dist_util.dev().type,
            init_scale=2.0**20,
            growth_factor=2.0**training.fp16_scale_growth,
            growth_interval=1,
            enabled=network.compute_dtype == th.float16,
        )
        self.bad_steps = th.zeros((), device=dist_util.dev())  # skipped in a row
        self.metrics = Metrics()
        self._shown: dict[str, str] = {}  # beside the progress bar
        self._loss = math.nan  # smoothed, as it is shown there
        retention = Retention.of(training, run)
        self.writer = CheckpointWriter(
            log.directory, log.info, retention, log.publish, description, run.weights_format
        )
        if resume is not None:
            self._load(resume)
        else:
            log.drop_rows_after(-1)  # of a run that was killed before its first checkpoint
        dist_util.sync_params([*self.parameters, *(a for ema in self.emas.values() for a in ema.average)])
        self._gradients, self._update = self._all_gradients, self._new_weights
        self._lr: th.Tensor | None = None
        if dist_util.dev().type == "cuda":
            # Where a graph reads it, and everything else, lest what is computed depend on there being graphs.
            self._lr = th.zeros((), device=dist_util.dev())
            for group in self.optimizer.param_groups:
                group["capturable"] = True
            if self._can_be_captured():
                self._gradients, self._update = Captured(self._all_gradients), Captured(self._new_weights)

    def run(self) -> None:
        """Train until the last iteration, or until a signal asks to stop; then save.

        Raises:
            Stopped: SIGTERM or SIGINT came, and the checkpoint is written.
            UserError: too many iterations in a row had non-finite gradients, or the last checkpoint
                could not be written.
        """
        if self.iterations and self.step >= self.iterations:
            self.log.info(f"nothing left to do: {self.step} iterations are done, of {self.iterations}")
        else:
            self.log.begin()
        self.network.train()
        self.objective.train()
        spent = self.log.last("seconds")
        if self.step == 0:
            self._record_pool()
        last = self.training.lr_anneal_steps
        if 0 < last < self.iterations - 1:
            self.log.info(
                f"WARNING: the learning rate is 0 after {last} iterations (lr_anneal_steps), of "
                f"{self.iterations} (run.iterations); give lr_anneal_steps with it (0: it stays)"
            )
        gain, bounded = self.process.last_kl_gain, self.process.bounds is not None  # a latent space is not
        if 1000 < gain < math.inf and not (self.training.clip_last and bounded):
            advice = "give clip_last=true" if bounded else "train in all steps (timestep_respacing)"
            self.log.info(
                f"WARNING: at the noisiest of {self.process.num_timesteps} steps the KL is {gain:.2g} times "
                f"the squared error of eps and drowns the rest; {advice}"
            )
        if not self.iterations:
            self.log.info("no end is set (run.iterations=N sets one): Ctrl-C saves a checkpoint and stops")
        if self.scorer is not None:
            every, samples = self.run_settings.eval_interval, self.run_settings.eval_samples
            self.log.info(f"scored every {every} iterations by {self.scorer.metric} of {samples} samples")
        progress = Progress(
            self.iterations or None, "training", "it", initial=self.step, active=dist_util.rank() == 0
        )
        with StopSignals() as signals, progress, closing(self.source):
            self._draw_what_was_due()
            stop = self._score_what_was_due(signals)
            started, step_at_start = time.monotonic(), self.step
            while not stop and (not self.iterations or self.step < self.iterations):
                reseed(self.run_settings.seed, dist_util.rank(), self.step)
                batch = self.source.next_batch(self.step)
                self.train_step(batch)
                progress.advance()
                log_due = self.step % self.training.log_interval == 0 or self.step == self.iterations
                if log_due:
                    seconds = time.monotonic() - started
                    self._log((self.step - step_at_start) / seconds, spent + seconds)
                    progress.show(self._shown)
                if log_due or self.step % self.run_settings.max_bad_steps == 0:
                    self._give_up_if_hopeless(batch)
                # A run whose last iteration is done has finished, whatever signal came.
                stop = self.step != self.iterations and dist_util.any_rank(bool(signals.received))
                scored = self._score_due() and not stop
                at_the_end = stop or self.step == self.iterations
                saved = at_the_end or scored or self.step % self.training.save_interval == 0
                if saved:
                    self.save()
                before = time.monotonic()
                if self.grids is not None and self._samples_due(saved) and not stop:
                    self.grids.save(self.step, self.network, self._scored_ema, self.log)
                if scored:
                    stop = self._score(signals)
                    progress.show(self._shown)
                started += time.monotonic() - before  # the rate is that of training
            dist_util.from_rank_zero(self.writer.close)
        if stop:
            raise Stopped(f"{signals.reason} at step {self.step}")

    def train_step(self, batch: Any) -> None:
        """One iteration: every pass's backward, one optimizer step, EMA, learning rate.

        Microbatches give the gradient of the whole batch, each counting by its share; only the
        contrastive term differs, since it sees no more than its own microbatch's negatives. Non-finite
        gradients leave the weights as they are.
        """
        rate = self._learning_rate()
        found = self._gradients(batch)
        dist_util.average_gradients(self.parameters)
        self.metrics.take(found | self._update(rate if self._lr is None else self._lr.fill_(rate)))
        self._set_lr(rate)  # the number again, for the log and checkpoints
        self.step += 1

    def _all_gradients(self, batch: Any) -> dict[str, th.Tensor]:
        """Every pass's forward and backward; the sums for the log."""
        # On a GPU gradients keep their place: that is where a graph of the optimizer's step reads them.
        self.optimizer.zero_grad(set_to_none=dist_util.dev().type != "cuda")
        size = self.training.microbatch if self.training.microbatch > 0 else len(batch)
        metrics = Metrics()
        for micro in batch.split(size):
            total: th.Tensor | float = 0.0
            for out in self.objective.passes(self.network, micro):
                self.scaler.scale(out.loss.mean() * (len(micro) / len(batch))).backward()
                metrics.add_pass(out, self.process.num_timesteps)
                total = total + out.loss.detach().mean()
            assert isinstance(total, th.Tensor)
            metrics.add("loss", total.expand(len(micro)))
        return metrics.sums

    def _new_weights(self, rate: float | th.Tensor) -> dict[str, th.Tensor]:
        """The optimizer's step at this learning rate, and the averages'; the sums for the log."""
        self._set_lr(rate)
        skipped, norm = self._optimizer_step()
        for ema in self.emas.values():
            ema.update(skipped, self.step if self.run_settings.ema_warmup else None)
        metrics = Metrics()
        metrics.sums["grad_norm"] = th.stack([th.where(skipped, 0.0, norm), (~skipped).float()])
        metrics.add("skipped", skipped)
        return metrics.sums

    def _optimizer_step(self) -> tuple[th.Tensor, th.Tensor]:
        """Clip, and step unless a gradient is not finite.

        Returns:
            bool [], whether the step was skipped, decided on the device without waiting for it; and the
            gradients' norm, [].
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = th.stack(th._foreach_norm(gradients)).norm()
        skipped = ~norm.isfinite()
        bad = skipped.float()
        if self.run_settings.grad_clip > 0:
            th._foreach_mul_(gradients, (self.run_settings.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        # The fused optimizer's own way of skipping, which GradScaler uses too.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]
        if self.scaler.is_enabled():
            self.scaler.update()
            # A floor of 1: below it the gradients themselves are at fault.
            self.scaler.update(self.scaler.scale(th.ones_like(norm)).clamp(min=1.0))
        self.bad_steps.add_(1).mul_(bad)
        return skipped, norm

    def _give_up_if_hopeless(self, batch: Any) -> None:
        """End the run when the last iterations were all skipped; checkpoints before them stay as they are.

        So it does at the end of one that is shorter, unless its loss scale has not yet found its size.
        """
        limit, at_the_end = self.run_settings.max_bad_steps, self.step == self.iterations
        if self.bad_steps < (min(limit, self.step) if at_the_end else limit):
            return
        if self.bad_steps < limit and self.scaler.get_scale() > 1:
            self.log.info("WARNING: every iteration was skipped, the loss scale still being found: run more")
            return
        name = f"bad-step{self.step:06d}.json"
        if dist_util.rank() == 0:
            facts = {key: describe(value) for key, value in vars(batch).items() if value is not None}
            gradients = {
                n: describe(p.grad) for n, p in self.network.named_parameters() if p.grad is not None
            }
            record = {"step": self.step, "batch": facts, "gradients": gradients}
            with self.log.tolerant():
                write_text(self.log.directory / name, json.dumps(record, indent=1))
        self.writer.wait()
        raise UserError(
            f"{DIVERGED} for {int(self.bad_steps)} iterations in a row, up to step "
            f"{self.step}; earlier checkpoints are kept, and {name} describes the step"
        )

    def save(self) -> None:
        """Have a checkpoint written. Collective."""
        self._record_pool()
        write = self.source.writer()
        totals = self.metrics.totals()
        if dist_util.rank() == 0:
            contents: dict[str, Any] = {"model": self.network.state_dict()}
            contents |= {f"ema_{rate}": ema.state_dict() for rate, ema in self.emas.items()}
            contents["opt"] = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "world_size": dist_util.world_size(),
                "metrics": totals,  # of the row of the log that is not full yet
                "bad_steps": self.bad_steps,
            }
            contents["head"] = self.objective.state_dict()
            if write is not None:
                contents["pool"] = write
            self.writer.submit(self.step, contents)

    @property
    def _scored_ema(self) -> Ema | None:
        """The average of `Training.scored_weights`; None if there is none."""
        return self.emas[max(self.emas)] if self.emas else None

    def _score_due(self) -> bool:
        return self.scorer is not None and self.scorer.due(self.step, self.step == self.iterations)

    @property
    def _goes_on(self) -> bool:
        """Whether this is a run that ended here, not one that begins from another's checkpoint."""
        return self.resumed is not None and self.resumed.directory.resolve() == self.log.directory.resolve()

    def _draw_what_was_due(self) -> None:
        """Draw grids of the step that is resumed from, if the run ended between its checkpoint and them."""
        if self.grids is not None and self._goes_on and self._samples_due(saved=True):
            self.grids.save(self.step, self.network, self._scored_ema, self.log, anew=False)

    def _score_what_was_due(self, signals: StopSignals) -> bool:
        """Score the step that is resumed from, if the run ended between its checkpoint and its score.

        Returns:
            Whether to stop, as `_score`.
        """
        if self.resumed is None or not self._goes_on or not self._score_due():
            return False
        if not self.resumed.has("score"):
            return self._score(signals)
        if dist_util.rank() == 0:
            self.writer.note_best(complete_checkpoints(self.log.directory))
        return False

    def _score(self, signals: StopSignals) -> bool:
        """Score the slowest average's weights; this step's checkpoint is submitted.

        Nothing of the training changes. A score that cannot be had costs the run no more than that.

        Returns:
            Whether to stop: a rank was asked to, and there are iterations to do or the score was not waited
            for, which resuming then sees to.
        """
        assert self.scorer is not None
        before, ema, score = time.monotonic(), self._scored_ema, None
        left = self.step != self.iterations
        try:
            with ema.swapped() if ema else nullcontext():
                score = self.scorer.score(self.network, lambda: bool(signals.received))
            left = left or score is None
        except UserError as error:
            self.log.info(f"WARNING: step {self.step} could not be scored: {error}; training goes on")
        if score is not None:
            seconds = time.monotonic() - before
            samples = f"{self.run_settings.eval_samples} samples, {seconds:.1f} s"
            self.log.info(f"step {self.step}: {score} ({samples})")
            self.log.row(self.step, score.columns())
            self._shown[score.metric] = f"{score.values['fd']:.4g}"
            if dist_util.rank() == 0:
                self.writer.add_score(self.step, score.record(self.training.scored_weights))
        return left and dist_util.any_rank(bool(signals.received))

    def _record_pool(self) -> None:
        if record := self.source.pool_record():
            self.log.pool(self.step, record)

    def _samples_due(self, saved: bool) -> bool:
        interval = self.run_settings.sample_interval
        return saved if interval == 0 else interval > 0 and self.step % interval == 0

    def _learning_rate(self) -> float:
        """This iteration's learning rate: linear warm-up times ADM's linear annealing.

        ADM lowers the rate after each step by the steps done before that one, so it lags one step behind.
        """
        factor = 1.0
        if self.training.lr_anneal_steps:
            factor = max(0.0, 1 - max(0, self.step - 1) / self.training.lr_anneal_steps)
        if self.run_settings.warmup_steps:
            factor *= min(1.0, (self.step + 1) / self.run_settings.warmup_steps)
        return self.training.lr * factor

    def _set_lr(self, rate: float | th.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _can_be_captured(self) -> bool:
        """Whether iterations may be launched as CUDA graphs, which do the same every time."""
        asked = self.run_settings.cuda_graphs and not self.run_settings.ema_warmup
        return asked and self.network.capturable and self.objective.capturable

    def _log(self, rate: float, seconds: float) -> None:
        """Record this step: `rate` in iterations per second, `seconds` of training so far."""
        values = self.metrics.read()
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["samples"] = float(self.step * self.training.batch_size)
        values["iterations_per_second"] = rate
        values["seconds"] = seconds
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        shown = {k: v for k, v in values.items() if k[-2:] not in ("q0", "q1", "q2", "q3")}
        for name in ("samples", "iterations_per_second", "seconds"):
            shown.pop(name)
        of = f"/{self.iterations}" if self.iterations else ""
        parts = [f"{name} {value:.4g}" for name, value in shown.items()]
        self.log.info(f"step {self.step}{of}: {', '.join(parts)} ({rate:.2f} it/s)")
        self.log.row(self.step, values)
        loss = values.get("loss", math.nan)
        self._loss = loss if math.isnan(self._loss) else 0.5 * (self._loss + loss)
        images = f"{rate * self.training.batch_size:.3g}"
        self._shown = {"images/s": images, "loss": f"{self._loss:.4g}"} | {
            name: value for name, value in self._shown.items() if name not in ("images/s", "loss")
        }

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint; an original's may lack parts, which then start anew and are named."""
        head = load_network(self.network, checkpoint.path("model"))
        for rate, ema in self.emas.items():
            name = f"ema_{rate}"
            if checkpoint.has(name):
                with ema.swapped():  # what is loaded ends in the average
                    load_network(self.network, checkpoint.path(name))
            else:
                ema.load_state_dict(self.network.state_dict())
        if checkpoint.has("head"):
            self._load_head(checkpoint.path("head"))
        elif head:
            self.objective.load_foreign_head(head, checkpoint.path("model"))
        if checkpoint.has("opt"):
            self._load_optimizer(checkpoint.path("opt"))
        expected = ["opt", "head", *(f"ema_{rate}" for rate in self.emas)]
        if self.source.has_state:
            expected.append("pool")
        missing = [name for name in expected if not checkpoint.has(name)]
        self.step = checkpoint.step
        self.log.drop_rows_after(self.step)
        note = f" (not there, so started anew: {', '.join(missing)})" if missing else ""
        self.log.info(f"resumed from step {self.step} of {checkpoint.directory}{note}")

    def _load_head(self, path: str | os.PathLike) -> None:
        try:
            load_strictly(self.objective, load_state_dict(path), path)
        except UserError as error:
            raise UserError(
                f"{error}; a run goes on with the stages, or the schedule_sampler, that it has: with others, "
                "begin from its weights (model_path) in another --exp_dir"
            ) from None

    def _load_optimizer(self, path: str | os.PathLike) -> None:
        state = read_torch_file(path)
        try:
            if "optimizer" in state:
                if state["scaler"] or not self.scaler.is_enabled():
                    self.scaler.load_state_dict(state["scaler"])
                    self.scaler.set_growth_factor(2.0**self.training.fp16_scale_growth)
                else:
                    self.log.info("the run had no loss scale so far; it starts anew")
                before, now = state["world_size"], dist_util.world_size()
                if before != now:
                    self.log.info(
                        f"the run had {before} rank(s), now {now}: what is drawn at random differs from "
                        "here on; weights, averages, optimizer and pool continue exactly"
                    )
                self.metrics.load_totals(state.get("metrics", {}))
                self.bad_steps = state.get("bad_steps", self.bad_steps).to(self.bad_steps)
                state = state["optimizer"]
            load_optimizer_state(self.optimizer, state)
            moments = [m for kept in self.optimizer.state.values() for m in kept.values() if th.is_tensor(m)]
            if self.bad_steps.shape or not all(bool(m.isfinite().all()) for m in moments):
                raise ValueError("its numbers are not finite, or of another shape")
        except th.OutOfMemoryError:
            raise
        except (LookupError, AttributeError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit the networks being trained ({error})") from None
