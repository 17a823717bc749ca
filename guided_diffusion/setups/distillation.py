"""Putting a distillation together: the teacher, the pool it belongs to, and the student's training."""

from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.settings import Experiment
from ..distill.dynamic_batch import DynamicBatch, pool_size
from ..distill.objectives import Distillation
from ..distill.pool_file import read_pool
from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from ..io.files import sha256_of
from ..logger import RunLog
from ..networks.precision import place
from ..runs.checkpoint import Checkpoint, load_network, load_strictly
from ..script_util import build_network
from ..train_util import TrainLoop, reseed, sample_process
from ..training.sources import TeacherSource
from ..unet import UNetModel


def load_teacher(experiment: Experiment, weights: Path) -> tuple[UNetModel, GaussianDiffusion]:
    """The teacher in eval mode on this rank's device, and its process. Its noise encoder, if any, is left."""
    settings = experiment.teacher
    assert settings is not None
    teacher, diffusion = build_network(settings, "teacher.")
    load_network(teacher, weights)
    teacher.eval().requires_grad_(False)
    place(teacher, settings, experiment.run, frozen=True)
    return teacher, diffusion


def pool_identity(experiment: Experiment, weights: Path, size: int) -> dict[str, Any]:
    """What a pool belongs to: written into its file, and compared when it is read."""
    settings = experiment.teacher
    assert settings is not None
    return {
        "T": settings.diffusion_steps,
        "noise_schedule": settings.noise_schedule,
        "timestep_respacing": settings.timestep_respacing,
        "image_size": settings.image_size,
        "class_cond": settings.class_cond,
        "iter_choice": settings.iter_choice,
        "rho": settings.BATCH,
        "batch_size": experiment.student.batch_size,
        "size": size,
        "stride": experiment.distill.stride,
        "teacher_sha256": sha256_of(weights),
    }


def fresh_pool(experiment: Experiment, teacher: UNetModel, total: int, size: int) -> DynamicBatch:
    """A pool of `size` samples of noise at level T, in float32: preparing rounds it once, at the end."""
    pool = DynamicBatch.of_noise(size, teacher.image_size, total, teacher.num_classes, dist_util.dev())
    return kept(pool, experiment, th.float32)


def kept(pool: DynamicBatch, experiment: Experiment, dtype: th.dtype | None = None) -> DynamicBatch:
    """The pool kept where the configuration says, and as it says unless a dtype is given."""
    storage = dist_util.dev() if experiment.distill.pool_device == "auto" else th.device("cpu")
    return pool.store(storage, dtype or getattr(th, experiment.distill.pool_dtype), dist_util.dev())


def open_pool(
    experiment: Experiment, weights: Path, pool_path: Path, teacher: UNetModel, total: int, batch_size: int
) -> DynamicBatch:
    """This rank's pool at the start of a distillation, on its device.

    Args:
        experiment: the configuration.
        weights: the teacher's checkpoint.
        pool_path: the prepared pool; not needed where all samples start from noise.
        teacher: the teacher.
        total: T.
        batch_size: of this rank.

    Raises:
        UserError: the pool is missing, damaged, or of something else.
    """
    settings = experiment.teacher
    assert settings is not None
    rank, world = dist_util.rank(), dist_util.world_size()
    if settings.iter_choice == "iterative_distillation":
        reseed(experiment.run.seed, rank, -1 % 2**32)
        return kept(fresh_pool(experiment, teacher, total, batch_size), experiment)
    size = pool_size(settings.iter_choice, settings.BATCH, total, batch_size)
    pool = read_pool(
        pool_path,
        total,
        settings.image_size,
        expected=pool_identity(experiment, weights, size * world),
        rank=rank,
        world_size=world,
    )
    if (pool.y is not None) != settings.class_cond:
        has = "has no" if settings.class_cond else "has"
        raise UserError(f"{pool_path}: {has} class labels, teacher.class_cond is {settings.class_cond}")
    return kept(pool, experiment)


def distillation_loop(
    experiment: Experiment,
    *,
    weights: Path,
    pool_path: Path,
    batch_size: int,
    log: RunLog,
    initial: Path | None = None,
    resume: Checkpoint | None = None,
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
    """
    settings, student, device = experiment.teacher, experiment.student, dist_util.dev()
    assert settings is not None
    teacher, teacher_diffusion = load_teacher(experiment, weights)
    reseed(experiment.run.seed, 0, 2**32 - 2)  # the same initial weights on every rank
    model, diffusion = build_network(student, "student.")
    objective = Distillation(
        model,
        diffusion,
        experiment.distill,
        clip_last=student.clip_last,
        input_perturb=settings.input_perturb,
    )
    if initial is not None:
        head = load_network(model, initial)
        if head and objective.noise_encoder is not None:
            load_strictly(objective.noise_encoder, head, initial)
    place(model, student, experiment.run)
    objective.to(device)

    total = teacher_diffusion.num_timesteps
    if resume is not None and resume.has("pool"):
        rank, world = dist_util.rank(), dist_util.world_size()
        pool = read_pool(resume.path("pool"), total, settings.image_size, rank=rank, world_size=world)
        pool = kept(pool, experiment)
    else:
        pool = open_pool(experiment, weights, pool_path, teacher, total, batch_size)
    if len(pool) < batch_size:
        raise UserError(f"the pool's {len(pool)} samples per rank are fewer than the batch's {batch_size}")

    distill = experiment.distill
    objective_name = "DKDM (both stages off)"
    if distill.stage1_weight or distill.stage2_weight:
        role = ", role vector" if objective.role is not None else ""
        objective_name = (
            f"TCCD (stage 1 x {distill.stage1_weight:g}, stage 2 x {distill.stage2_weight:g}{role})"
        )
    count = sum(p.numel() for p in model.parameters())
    log.info(
        f"objective: {objective_name}; student {count / 1e6:.2f}M parameters; "
        f"pool of {len(pool)} samples per rank; {model.compute_dtype} arithmetic on {device}"
    )
    return TrainLoop(
        model=model,
        objective=objective,
        source=TeacherSource(pool, teacher, teacher_diffusion, batch_size, settings.prob),
        diffusion=diffusion,
        sample_diffusion=sample_process(student, experiment.run),
        student=student,
        run=experiment.run,
        log=log,
        resume=resume,
    )
