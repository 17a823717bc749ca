"""The pool of a distillation: its seed and file, what it belongs to, and reading it."""

from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.settings import DistillationExperiment, flat, free_to_differ
from ..distill.dynamic_batch import DynamicBatch, pool_size
from ..distill.pool_file import read_pool, read_pool_header
from ..distill.teacher import Teacher
from ..errors import UserError
from ..io.model_folder import weights_sha256
from ..logger import RunLog
from ..script_util import build_space
from ..train_util import reseed


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
    require_labels(pool, teacher, pool_path)
    return pool


def require_labels(pool: DynamicBatch, teacher: Teacher, path: Path) -> None:
    """Raise `UserError` unless a pool's labels, its kept outputs' too, are classes of the teacher's."""
    count = teacher.network.num_classes
    for y in (pool.y, None if pool.replay is None else pool.replay.y):
        if y is not None and count is not None and len(y) and not 0 <= int(y.min()) <= int(y.max()) < count:
            found = f"{int(y.min())} to {int(y.max())}"
            raise UserError(f"{path}: has labels from {found}, and the teacher {count} classes")


def kept_pool(
    experiment: DistillationExperiment,
    path: Path,
    belongs_to: dict[str, Any],
    teacher: Teacher,
    batch_size: int,
    log: RunLog,
) -> DynamicBatch:
    """This rank's share of the pool that a checkpoint keeps at `path`; for the rest see `open_pool`."""
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
    require_labels(pool, teacher, path)
    return pool
