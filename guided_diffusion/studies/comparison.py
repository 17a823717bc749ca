"""How far a student is from its teacher: on states of the teacher's chain, and along the student's own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from safetensors.torch import save_file

from .. import dist_util
from ..config.settings import DistillationExperiment
from ..distill.dynamic_batch import prepare
from ..distill.teacher import Teacher
from ..gaussian_diffusion import GaussianDiffusion
from ..io.files import atomic_path
from ..io.safetensors_file import read_safetensors
from ..losses import normal_kl
from ..networks.base import DenoisingNetwork
from ..networks.precision import place
from ..runs.weights import load_network
from ..sampling.samplers import SeededNoise
from ..script_util import build_network, build_process
from ..setups.distillation import load_teacher
from ..setups.pools import noise_pool
from ..train_util import reseed

_SEED = 99  # of the held-out states, and of the chains' noise; no run's pool has it
_ROWS = 128  # of a network's call


@dataclass(frozen=True)
class HeldOut:
    """States on the teacher's full chain, each at a random t, and what it predicts there.

    Attributes:
        x: float32 [N, C, H, W].
        t: int64 [N], steps of the process.
        y: class labels int64 [N], or None.
        eps: the teacher's noise prediction, float32 [N, C, H, W].
    """

    x: th.Tensor
    t: th.Tensor
    y: th.Tensor | None
    eps: th.Tensor


def held_out_states(
    experiment: DistillationExperiment, weights: Path, count: int, cache: Path, check: Callable[[], None]
) -> HeldOut:
    """Draw the states, or read them from where they were kept.

    Args:
        experiment: the teacher's configuration.
        weights: its checkpoint.
        count: N.
        cache: where they are kept; the name tells teachers apart.
        check: called now and then; what it raises ends this.
    """
    if not cache.is_file():
        teacher = load_teacher(experiment, weights)
        reseed(_SEED, 0, 0)
        pool = noise_pool(teacher, count)
        for _ in prepare(pool, teacher, _ROWS):
            check()
        x, levels, y = pool.take(th.arange(count, device=dist_util.dev()))
        t = levels - 1
        eps = th.cat(
            [
                teacher.step(x[rows], t[rows], None if y is None else y[rows]).eps
                for rows in th.arange(count, device=t.device).split(_ROWS)
            ]
        )
        arrays = {"x": x, "t": t, "eps": eps} | ({} if y is None else {"y": y})
        with atomic_path(cache) as temporary:
            save_file({name: array.cpu() for name, array in arrays.items()}, temporary)
    found = {name: array.to(dist_util.dev()) for name, array in read_safetensors(cache).items()}
    return HeldOut(found["x"], found["t"], found.get("y"), found["eps"])


class Comparison:
    """A student beside its teacher.

    Args:
        experiment: the configuration of both.
        teacher_weights, student_weights: their checkpoints.
    """

    def __init__(self, experiment: DistillationExperiment, teacher_weights: Path, student_weights: Path):
        student = experiment.student
        self.experiment = experiment
        self.teacher: Teacher = load_teacher(experiment, teacher_weights)
        self.student, self.process = build_network(student, "student.")
        load_network(self.student, student_weights)
        place(self.student.eval(), student.architecture.use_fp16, experiment.run, frozen=True)

    @th.no_grad()
    def held_out(self, states: HeldOut) -> dict[str, Any]:
        """Mean squared difference of the noise predictions on held-out states, see `by_quarter`."""
        errors = []
        for rows in th.arange(len(states.t), device=states.t.device).split(_ROWS):
            y = None if states.y is None else states.y[rows]
            eps, _ = _predict(self.student, self.process, states.x[rows], states.t[rows], y)
            errors.append((eps - states.eps[rows]).square().mean(dim=(1, 2, 3)))
        return by_quarter(th.cat(errors), states.t, self.process.num_timesteps)

    def own_chain(self, chains: int, respacing: str, check: Callable[[], None]) -> dict[str, Any]:
        """Compare along the student's own ancestral chains, of `respacing` steps.

        Args:
            chains: how many, with the same noise for every student.
            respacing: as image_sample.py's.
            check: called before every step; what it raises ends this.

        Returns:
            "eps": mean squared difference of the noise predictions at the states of the chains, in all and by
            quarters of T; "path_kl": the sum over the steps of KL(student's step || teacher's step) in nats,
            summed over an image's values, mean over the chains; "step_kl": that of each step, by t.
        """
        process = build_process(self.experiment.student, "metrics.respacing", respacing)
        teacher_process = build_process(self.experiment.teacher, "metrics.respacing", respacing)
        errors: list[th.Tensor] = []
        steps: list[th.Tensor] = []
        divergence = th.zeros(process.num_timesteps, dtype=th.float64)
        for first in range(0, chains, _ROWS):
            rows = range(first, min(first + _ROWS, chains))
            for t, error, kl in self._chain(process, teacher_process, rows, check):
                errors.append(error)
                steps.append(t)
                divergence[t[0]] += kl.sum().double().cpu()
        eps = by_quarter(th.cat(errors), th.cat(steps), process.num_timesteps)
        divergence /= chains
        return {"eps": eps, "path_kl": float(divergence.sum()), "step_kl": divergence.tolist()}

    @th.no_grad()
    def _chain(
        self, process: GaussianDiffusion, teacher: GaussianDiffusion, rows: range, check: Callable[[], None]
    ) -> Iterator[tuple[th.Tensor, th.Tensor, th.Tensor]]:
        """t int64 [B], and errors and divergences float32 [B] at each step."""
        noise = SeededNoise(_SEED, rows, dist_util.dev())
        student = self.student
        y = None if student.num_classes is None else noise.labels(student.num_classes).to(dist_util.dev())
        x = noise(th.empty(len(rows), *student.shape, device=dist_util.dev()))
        for step in reversed(range(process.num_timesteps)):
            check()
            t = th.full((len(rows),), step, device=x.device)
            eps, output = _predict(student, process, x, t, y)
            target, target_output = _predict(self.teacher.network, teacher, x, t, y)
            own, other = process.p_distribution(output, x, t), teacher.p_distribution(target_output, x, t)
            kl = normal_kl(own["mean"], own["log_variance"], other["mean"], other["log_variance"])
            yield t, (eps - target).square().mean(dim=(1, 2, 3)), kl.sum(dim=(1, 2, 3))
            scale = th.exp(0.5 * own["log_variance"]) if step else 0.0
            x = own["mean"] + scale * noise(x)


def by_quarter(errors: th.Tensor, t: th.Tensor, num_timesteps: int) -> dict[str, Any]:
    """The mean of errors [N], and that of each quarter of {0..T-1}, the cleanest first (None: holds none)."""
    quarter = 4 * t // num_timesteps
    parts = [errors[quarter == number] for number in range(4)]
    return {"all": float(errors.mean()), "quarters": [float(p.mean()) if len(p) else None for p in parts]}


def _predict(
    network: DenoisingNetwork, process: GaussianDiffusion, x: th.Tensor, t: th.Tensor, y: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """The noise prediction float32 [B, C, H, W], and the whole output."""
    output = network(x, process.model_timesteps(t), y)
    return process.eps_of(output, x, t), output
