"""What a run costs in floating point operations, counted instead of timed: the same on every machine.

PyTorch's counter counts matrix products and convolutions, two operations for a multiplication and an
addition; element-wise work, such as AdamW's and averaging, is not counted. It looks at one batch of few
rows, and what it finds is taken for all.
"""

from dataclasses import dataclass

import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..config.settings import DistillationExperiment, Experiment
from ..distill.dynamic_batch import DynamicBatch, pool_size
from ..distill.teacher import Teacher
from ..gaussian_diffusion import GaussianDiffusion
from ..networks.base import DenoisingNetwork
from ..networks.guidance import guided
from ..resample import create_named_schedule_sampler
from ..script_util import build_network, build_process, build_space
from ..setups.distillation import build_objective
from ..training.objective import DiffusionTraining, ImageBatch, Objective
from ..training.optimizer import build_optimizer
from .study_file import Data

_ROWS = 16  # what is counted, where it has the same shares as a larger batch


@dataclass(frozen=True)
class Ledger:
    """Floating point operations of a run.

    Attributes:
        preparation: of everything before the first iteration.
        teacher, student, head, optimizer: of an iteration: the teacher's evaluations; the student's forward
            and backward passes; what is trained beside it, forward and backward; the optimizer's products.
    """

    preparation: float = 0.0
    teacher: float = 0.0
    student: float = 0.0
    head: float = 0.0
    optimizer: float = 0.0

    @property
    def iteration(self) -> float:
        """Of an iteration."""
        return self.teacher + self.student + self.head + self.optimizer

    def of(self, iterations: int) -> dict[str, float]:
        """Part by part, and in all, after so many iterations."""
        parts = {"preparation": self.preparation}
        for name in ("teacher", "student", "head", "optimizer"):
            parts[name] = iterations * getattr(self, name)
        return parts | {"total": sum(parts.values())}


def ledger_of(experiment: DistillationExperiment, data: Data | None, images: int) -> Ledger:
    """Count what a run costs.

    Args:
        experiment: its configuration.
        data: what it trains on instead of distilling, if so.
        images: how many images that are.
    """
    batch = experiment.student.training.batch_size
    shares = (experiment.distill.stage1_fraction, experiment.distill.stage2_fraction)
    rows = _ROWS if batch > _ROWS and all(_ROWS * share % 1 == 0 for share in shares) else batch
    network, process = build_network(experiment.student, "student.")
    teacher_network, teacher_process = build_network(experiment.teacher, "teacher.")
    teacher_network.eval().requires_grad_(False)
    evaluated = guided(teacher_network, experiment.teacher.guidance_scale)
    teacher = Teacher(evaluated, teacher_process, build_space(experiment.teacher))
    x, y = _inputs(network, rows)
    t = th.randint(process.num_timesteps, (rows,))
    with sdpa_kernel(SDPBackend.MATH):
        evaluation = _count(lambda: teacher.step(x, t, y)) / rows
        if data is not None:
            steps = build_process(experiment.teacher, "data.respacing", data.respacing).num_timesteps
            sampler = create_named_schedule_sampler("uniform", process.num_timesteps)
            objective: Objective = DiffusionTraining(process, sampler)
            trained = _passes(objective, network, ImageBatch(x, y))
            synthetic = images - round(data.real * images)
            optimizer = _optimizer(experiment, network, objective)
            preparation = synthetic * steps * evaluation
            return Ledger(preparation, student=trained * batch / rows, optimizer=optimizer)
        objective = build_objective(experiment, teacher, network, process)
        pool = DynamicBatch(x.clone(), t + 1, process.num_timesteps, y)
        maps = objective.teacher_maps
        taught = _count(lambda: pool.advance(th.arange(rows), teacher, **maps)) / rows
        piece = pool.advance(th.arange(rows), teacher, **maps)
        passes = _passes(objective, network, piece) / rows
        student = _student(objective, network, piece, passes * rows) / rows
    prepared = _prepared_rows(experiment, teacher_process)
    return Ledger(
        preparation=prepared * evaluation,
        teacher=batch * taught / experiment.teacher.prob / experiment.distill.teacher_interval,
        student=batch * student,
        head=batch * (passes - student),
        optimizer=_optimizer(experiment, network, objective),
    )


def chains_seen(experiment: DistillationExperiment, iterations: int) -> float:
    """About how many different chains of the teacher's a student is shown: the pool's, and those begun anew.

    A draw takes an entry `advance_stride` of the T steps further in the mean, and a new chain begins after T.
    """
    total = build_process(experiment.teacher, "teacher.timestep_respacing").num_timesteps
    batch = experiment.student.training.batch_size
    size = pool_size(experiment.teacher.iter_choice, experiment.teacher.BATCH, total, batch)
    draws = iterations * batch / experiment.teacher.prob / experiment.distill.teacher_interval
    return size + draws * experiment.distill.advance_stride / total


def _prepared_rows(experiment: DistillationExperiment, process: GaussianDiffusion) -> float:
    """Rows of teacher calls that the preparation is expected to take; its levels are drawn evenly."""
    teacher, total = experiment.teacher, process.num_timesteps
    if teacher.iter_choice == "iterative_distillation" or total < 2:
        return 0.0
    size = pool_size(teacher.iter_choice, teacher.BATCH, total, experiment.student.training.batch_size)
    jumps = [-(-steps // experiment.distill.stride) for steps in range(1, total)]
    return size * sum(jumps) / len(jumps)


def _student(objective: Objective, network: DenoisingNetwork, batch: object, passes: float) -> float:
    """What of all passes is the student's own: the same passes, with its evaluations alone counted."""
    counted = 0.0
    evaluate = network.evaluate

    def watched(x: th.Tensor, *args, **kwargs):
        nonlocal counted
        counted += _count(lambda: evaluate(x.detach(), *args, **kwargs).output.square().mean().backward())
        return evaluate(x, *args, **kwargs)

    network.evaluate = watched  # type: ignore[method-assign]
    try:
        for out in objective.passes(network, batch):
            out.loss.mean().backward()
    finally:
        del network.evaluate
    return min(counted, passes)


def _optimizer(experiment: Experiment, network: DenoisingNetwork, objective: Objective) -> float:
    """What a step costs; there are gradients."""
    return _count(build_optimizer(experiment.student.training, experiment.run, network, objective).step)


def _passes(objective: Objective, network: DenoisingNetwork, batch: object) -> float:
    def run() -> None:
        for out in objective.passes(network, batch):
            out.loss.mean().backward()

    return _count(run)


def _inputs(network: DenoisingNetwork, rows: int) -> tuple[th.Tensor, th.Tensor | None]:
    y = None if network.num_classes is None else th.randint(network.num_classes, (rows,))
    return th.randn(rows, *network.shape), y


def _count(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
