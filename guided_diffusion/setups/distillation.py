"""Putting a distillation together: the teacher, the pool, and the student's training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import dist_util
from ..config.registry import OBJECTIVES, look_up
from ..config.settings import DistillationExperiment
from ..distill.objectives import Distillation, share_of
from ..distill.source import TeacherSource
from ..distill.teacher import Teacher
from ..errors import UserError
from ..io.description import read_description
from ..logger import RunLog
from ..networks.base import DenoisingNetwork
from ..networks.guidance import guided
from ..networks.precision import place
from ..networks.weight_selection import selected
from ..respace import SpacedDiffusion
from ..runs.checkpoint import Checkpoint
from ..runs.provenance import has_untrained_null_class, require_known_steps
from ..runs.weights import build_loaded, load_network, require_agreement
from ..script_util import build_network, build_space
from ..train_util import TrainLoop, reseed
from ..training.grids import Grids, sampling_process
from ..training.scoring import Judge, Scorer
from .pools import kept_pool, open_pool, pool_seed, stored, teacher_identity


def load_teacher(experiment: DistillationExperiment, weights: Path) -> Teacher:
    """The teacher in eval mode on this rank's device, guided if so configured.

    Its noise encoder, if any, is ignored.
    """
    settings = experiment.teacher
    network, process = _loaded(experiment, weights)
    if settings.guidance_scale and has_untrained_null_class(read_description(weights)):
        dist_util.warn(f"{weights}: guided by a null class that was not trained (class_dropout_prob 0)")
    network.eval().requires_grad_(False)
    place(network, settings.architecture.use_fp16, experiment.run, frozen=True)
    return Teacher(guided(network, settings.guidance_scale), process, build_space(settings))


def _loaded(experiment: DistillationExperiment, weights: Path) -> tuple[DenoisingNetwork, SpacedDiffusion]:
    """The teacher's network as it was saved, and its process."""
    require_agreement(experiment.teacher, weights, "teacher.")
    network, process = build_loaded(experiment.teacher, weights, "teacher.")
    require_known_steps(experiment.teacher, process, read_description(weights))
    return network, process


def select_weights(network: DenoisingNetwork, experiment: DistillationExperiment, weights: Path) -> None:
    """Give a student initial weights selected from the teacher's; see `networks.weight_selection`.

    What gives the prediction stays the student's own where it predicts another quantity than the teacher.

    Args:
        network: the student, in float32.
        experiment: the configuration.
        weights: the teacher's checkpoint.

    Raises:
        UserError: the two are not of one kind, or the student is somewhere the larger.
    """
    teacher, _ = _loaded(experiment, weights)
    try:
        own = network.selectable_weights()
        state = selected(teacher.selectable_weights(), own)
    except ValueError as error:
        raise UserError(
            f"distill.initial_weights: a student cannot start from this teacher: {error}; give random"
        ) from None
    if experiment.student.process.prediction_type != experiment.teacher.process.prediction_type:
        mean = own.mean_rows()  # the teacher's predict something else
        for name in (f"{own.output}.weight", f"{own.output}.bias"):
            state[name][mean] = own.state[name][mean]
    network.load_state_dict(network.from_diffusers(state))


def build_objective(
    experiment: DistillationExperiment,
    teacher: Teacher,
    network: DenoisingNetwork,
    process: SpacedDiffusion,
) -> Distillation:
    """The objective that `distill.objective` names, with the heads it trains beside the student.

    Args:
        experiment: the configuration.
        teacher: the teacher, from which heads may take widths.
        network: the student.
        process: the student's.

    Raises:
        UserError: no such objective.
    """
    name = experiment.distill.objective
    kind = look_up(OBJECTIVES, name, "distill.objective")
    if not (isinstance(kind, type) and issubclass(kind, Distillation)):
        raise UserError(f"distill.objective: '{name}' is no subclass of distill.objectives.Distillation")
    return kind(
        network,
        process,
        experiment.distill,
        clip_last=experiment.student.training.clip_last,
        input_perturb=experiment.teacher.input_perturb,
        teacher=teacher,
    )


def _grids(experiment: DistillationExperiment, teacher: Teacher) -> Grids | None:
    run = experiment.run
    if run.sample_interval < 0:
        return None
    own, theirs = (sampling_process(one, run) for one in (experiment.student, experiment.teacher))
    return Grids(own, teacher.space, run.num_samples, run.seed, (teacher.network, theirs))


def _student(
    experiment: DistillationExperiment,
    teacher: Teacher,
    weights: Path,
    log: RunLog,
    initial: Path | None,
    resume: Checkpoint | None,
) -> tuple[DenoisingNetwork, SpacedDiffusion, Distillation]:
    """The student with its initial weights, its process and its objective, on the device."""
    student = experiment.student
    reseed(experiment.run.seed, 0, 2**32 - 2)  # the same initial weights on every rank
    network, process = build_network(student, "student.")
    objective = build_objective(experiment, teacher, network, process)
    if resume is not None:
        require_agreement(student, resume.path("model"), "student.")
    elif initial is not None:
        require_agreement(student, initial, "student.")
        if head := load_network(network, initial):
            objective.load_foreign_head(head, initial)
    elif experiment.distill.initial_weights == "teacher":
        select_weights(network, experiment, weights)
        log.info("the student's initial weights are selected from the teacher's")
    if student.process.prediction_type == "sample" and experiment.distill.loss_weight != "min_snr":
        log.info(
            "WARNING: a student that predicts x_0 hardly learns noisy states from squared errors of eps: "
            "give distill.loss_weight=min_snr"
        )
    place(network, student.architecture.use_fp16, experiment.run)
    return network, process, objective.to(dist_util.dev())


def _compared(experiment: DistillationExperiment, batch_size: int) -> int:
    """How many samples stage 1 compares with each other."""
    microbatch = experiment.student.training.microbatch
    piece = batch_size if microbatch < 1 else min(microbatch, batch_size)
    compared = share_of(experiment.distill.stage1_fraction, piece)
    return compared * (dist_util.world_size() if experiment.distill.gather_negatives else 1)


def distillation_loop(
    experiment: DistillationExperiment,
    *,
    weights: Path,
    pool_path: Path,
    batch_size: int,
    log: RunLog,
    initial: Path | None = None,
    resume: Checkpoint | None = None,
    description: dict[str, Any] | None = None,
    load_judge: Callable[[int], Judge] | None = None,
) -> TrainLoop:
    """Build everything a distillation needs, ready to run.

    Args:
        experiment: the configuration.
        weights: the teacher's checkpoint.
        pool_path: the prepared pool.
        batch_size: of this rank.
        log: the record.
        initial: the student's initial weights, if not random.
        resume: continue from this checkpoint, with the pool it holds.
        description: what checkpoints say of the student.
        load_judge: gives what scores images of a size, while the student trains; None for no scores.

    Raises:
        UserError: files that are missing, damaged or of something else, or settings that contradict another.
    """
    student, run = experiment.student, experiment.run
    teacher, belongs_to = load_teacher(experiment, weights), teacher_identity(experiment, weights)
    scorer = None
    if load_judge is not None:
        scorer = Scorer(load_judge, run, sampling_process(student, run), teacher.space, batch_size)
    network, process, objective = _student(experiment, teacher, weights, log, initial, resume)
    if resume is not None and resume.has("pool"):
        pool = kept_pool(experiment, resume.path("pool"), belongs_to, teacher, batch_size, log)
    else:
        pool = open_pool(experiment, weights, pool_path, teacher, batch_size)
    pool = stored(pool, experiment)
    if len(pool) < batch_size:
        raise UserError(f"the pool's {len(pool)} samples per rank are fewer than the batch's {batch_size}")
    count = sum(p.numel() for p in network.parameters())
    log.info(
        f"objective: {objective.describe()}; student {count / 1e6:.2f}M parameters; pool of {len(pool)} "
        f"samples per rank (seed {pool_seed(experiment)}); {network.compute_dtype} arithmetic on "
        f"{dist_util.dev()}"
    )
    if objective.noise_encoder is not None and _compared(experiment, batch_size) == 1:
        log.info(
            "WARNING: stage 1 compares a sample with the others of its piece, and there are none: it trains "
            "nothing with this student.batch_size, student.microbatch and distill.stage1_fraction"
        )
    source = TeacherSource(
        pool,
        teacher,
        batch_size,
        experiment.distill,
        belongs_to,
        prob=experiment.teacher.prob,
        ramp=(run.iterations or student.training.lr_anneal_steps) / 3,
        **objective.teacher_maps,
    )
    if experiment.distill.on_policy:
        objective.follow = source.follow
    return TrainLoop(
        network=network,
        objective=objective,
        source=source,
        process=process,
        training=student.training,
        run=run,
        log=log,
        grids=_grids(experiment, teacher),
        scorer=scorer,
        resume=resume,
        description=description,
    )
