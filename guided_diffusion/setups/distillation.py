"""Putting a distillation together: the teacher, the pool it belongs to, and the student's training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.registry import OBJECTIVES, look_up
from ..config.settings import DistillationExperiment, flat, free_to_differ
from ..distill.dynamic_batch import DynamicBatch, pool_size
from ..distill.objectives import Distillation, share_of
from ..distill.pool_file import read_pool, read_pool_header
from ..distill.source import TeacherSource
from ..distill.teacher import Teacher
from ..errors import UserError
from ..io.description import read_description
from ..io.model_folder import weights_sha256
from ..logger import RunLog
from ..networks.base import DenoisingNetwork
from ..networks.guidance import guided
from ..networks.precision import place
from ..networks.weight_selection import selected
from ..respace import SpacedDiffusion
from ..runs.checkpoint import Checkpoint
from ..runs.provenance import require_known_steps
from ..runs.weights import load_network, require_agreement
from ..script_util import build_network, build_space
from ..train_util import TrainLoop, reseed
from ..training.grids import Grids, sampling_process
from ..training.scoring import Judge, Scorer


def load_teacher(experiment: DistillationExperiment, weights: Path) -> Teacher:
    """The teacher in eval mode on this rank's device, guided if so configured.

    Its noise encoder, if any, is ignored.
    """
    settings = experiment.teacher
    network, process = _loaded(experiment, weights)
    network.eval().requires_grad_(False)
    place(network, settings.architecture.use_fp16, experiment.run, frozen=True)
    return Teacher(guided(network, settings.guidance_scale), process, build_space(settings))


def _loaded(experiment: DistillationExperiment, weights: Path) -> tuple[DenoisingNetwork, SpacedDiffusion]:
    """The teacher's network as it was saved, and its process."""
    network, process = build_network(experiment.teacher, "teacher.")
    require_agreement(experiment.teacher, weights, "teacher.")
    require_known_steps(experiment.teacher, process, read_description(weights))
    load_network(network, weights)
    return network, process


def select_weights(network: DenoisingNetwork, experiment: DistillationExperiment, weights: Path) -> None:
    """Give a student first weights selected from the teacher's; see `networks.weight_selection`.

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


def pool_seed(experiment: DistillationExperiment) -> int:
    """The seed that the pool is prepared with."""
    return experiment.run.seed if experiment.distill.pool_seed == -1 else experiment.distill.pool_seed


def pool_file(experiment: DistillationExperiment, tempfile: Path) -> Path:
    """The file of this seed's pool: `tempfile` itself for seed 0, NAME-seedN.cache beside it for others.

    A pool that does not say its seed (an original's) serves every seed.

    Args:
        experiment: the configuration.
        tempfile: where `teacher.tempfile` lies.
    """
    seed = pool_seed(experiment)
    own = tempfile.with_name(f"{tempfile.stem}-seed{seed}{tempfile.suffix}") if seed else tempfile
    if not own.is_file() and tempfile.is_file() and "seed" not in read_pool_header(tempfile):
        return tempfile
    return own


def pool_identity(experiment: DistillationExperiment, weights: Path, size: int) -> dict[str, Any]:
    """What a prepared pool belongs to: written into its file, and compared when it is read."""
    return teacher_identity(experiment, weights) | {
        "iter_choice": experiment.teacher.iter_choice,
        "rho": experiment.teacher.BATCH,
        "batch_size": experiment.student.training.batch_size,
        "size": size,
        "stride": experiment.distill.stride,
        "seed": pool_seed(experiment),
    }


def teacher_identity(experiment: DistillationExperiment, weights: Path) -> dict[str, Any]:
    """The teacher's part of what a pool depends on; a pool made with another is refused."""
    teacher = experiment.teacher
    identity = {
        "T": teacher.process.diffusion_steps,
        "noise_schedule": teacher.process.noise_schedule,
        "prediction_type": teacher.process.prediction_type,
        "timestep_respacing": teacher.process.timestep_respacing,
        "image_size": teacher.architecture.image_size,
        "class_cond": teacher.architecture.class_cond,
        "teacher_sha256": weights_sha256(weights),
    }
    for name, value in flat(teacher.architecture).items():
        if name not in identity and not free_to_differ(name, teacher.architecture):
            identity[f"architecture.{name}"] = value  # some, such as the number of heads, no weights show
    said = flat(teacher.process) | {"guidance_scale": teacher.guidance_scale}
    for name in ("beta_start", "beta_end", "sigma_small", "guidance_scale"):
        if said[name]:
            identity[name] = said[name]
    if said["rescale_timesteps"] and said["diffusion_steps"] != 1000:  # of 1000 it changes nothing
        identity["rescale_timesteps"] = True
    if said["clip_denoised"] == bool(teacher.space.vae_path):  # not as usual
        identity["clip_denoised"] = said["clip_denoised"]
    return identity | build_space(teacher).identity()


def noise_pool(teacher: Teacher, size: int) -> DynamicBatch:
    """A pool of `size` samples of noise at level T on this rank's device, in float32."""
    total, classes = teacher.process.num_timesteps, teacher.network.num_classes
    return DynamicBatch.of_noise(size, teacher.space.shape, total, classes, dist_util.dev())


def stored(pool: DynamicBatch, experiment: DistillationExperiment) -> DynamicBatch:
    """The pool moved to `distill.pool_device` as `distill.pool_dtype`."""
    storage = dist_util.dev() if experiment.distill.pool_device == "auto" else th.device("cpu")
    return pool.stored_on(storage, getattr(th, experiment.distill.pool_dtype), dist_util.dev())


def open_pool(
    experiment: DistillationExperiment, weights: Path, pool_path: Path, teacher: Teacher, batch_size: int
) -> DynamicBatch:
    """This rank's pool at the start of a distillation.

    Args:
        experiment: the configuration.
        weights: the teacher's checkpoint.
        pool_path: the prepared pool; not needed where all samples start from noise.
        teacher: the teacher.
        batch_size: of this rank.

    Raises:
        UserError: the pool is missing, damaged, or of something else.
    """
    settings, total = experiment.teacher, teacher.process.num_timesteps
    rank, world = dist_util.rank(), dist_util.world_size()
    if settings.iter_choice == "iterative_distillation":
        reseed(pool_seed(experiment), rank, -1 % 2**32)
        return noise_pool(teacher, batch_size)
    size = pool_size(settings.iter_choice, settings.BATCH, total, batch_size)
    pool = read_pool(
        pool_path,
        total,
        teacher.space.shape,
        expected=pool_identity(experiment, weights, size * world),
        rank=rank,
        world_size=world,
    )
    class_cond = settings.architecture.class_cond
    if (pool.y is not None) != class_cond:
        has = "has no" if class_cond else "has"
        raise UserError(f"{pool_path}: {has} class labels, teacher.class_cond is {class_cond}")
    return pool


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
    """The student with its first weights, its process and its objective, on the device."""
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
        log.info("the student's first weights are selected from the teacher's")
    place(network, student.architecture.use_fp16, experiment.run)
    return network, process, objective.to(dist_util.dev())


def _kept_pool(
    experiment: DistillationExperiment,
    path: Path,
    belongs_to: dict[str, Any],
    teacher: Teacher,
    batch_size: int,
    log: RunLog,
) -> DynamicBatch:
    """This rank's share of the pool that a checkpoint keeps."""
    rank, world, total = dist_util.rank(), dist_util.world_size(), teacher.process.num_timesteps
    says = "teacher_sha256" in read_pool_header(path)  # one of an earlier version does not
    expected = belongs_to if says else None
    pool = read_pool(path, total, teacher.space.shape, expected=expected, rank=rank, world_size=world)
    configured = pool_size(experiment.teacher.iter_choice, experiment.teacher.BATCH, total, batch_size)
    if len(pool) != configured:
        log.info(
            f"the pool stays the checkpoint's, {len(pool)} samples per rank, though teacher.BATCH, "
            f"student.batch_size and teacher.iter_choice say {configured}"
        )
    return pool


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
        pool = _kept_pool(experiment, resume.path("pool"), belongs_to, teacher, batch_size, log)
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
