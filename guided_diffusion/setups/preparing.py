"""Preparing the dynamic batch: all ranks denoise the pool of a configuration, which becomes one file.

A preparation that is stopped leaves beside the pool what each rank has of it, `POOL.rankN.partial`, and the
same command goes on from there as if it had never stopped, to the last bit.
"""

import glob
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.loading import experiment_keys
from ..config.settings import DistillationExperiment, dotted
from ..distill.dynamic_batch import DynamicBatch, draw_goals, pool_size, prepare
from ..distill.pool_file import join_parts, part_path, read_pool, require_replaceable, write_pool
from ..distill.teacher import Teacher
from ..errors import UserError
from ..io.files import held, remove_leftovers
from ..io.progress import Progress, warn
from ..io.safetensors_file import read_arrays, write_arrays
from ..processes.stopping import Stopped, StopSignals
from ..train_util import reseed
from .distillation import load_teacher
from .pools import noise_pool, pool_file, pool_identity, pool_seed, stored


def prepare_pool(
    experiment: DistillationExperiment, *, weights: Path, tempfile: Path, batch_size: int, overwrite: bool
) -> None:
    """Prepare a configuration's pool, or finish a preparation that was stopped. Collective.

    Args:
        experiment: the configuration.
        weights: the teacher's checkpoint.
        tempfile: where `teacher.tempfile` lies; `pool_file` says what the pool of the configuration's seed is
            called. One that is there and belongs to the configuration is left as it is.
        batch_size: the student's, of this rank.
        overwrite: prepare anew what is there already.

    Raises:
        UserError: a pool, or a stopped preparation, of something else is there, or another process is
            writing there, or a rank has another configuration.
        Stopped: SIGTERM or SIGINT came, and what each rank has of the pool is written.
    """
    dist_util.require_same(dotted(experiment_keys(experiment)))
    settings, path = experiment.teacher, pool_file(experiment, tempfile)
    rank, world = dist_util.rank(), dist_util.world_size()
    teacher = load_teacher(experiment, weights)
    total, shape = teacher.process.num_timesteps, teacher.space.shape
    if path.is_dir():
        raise UserError(f"teacher.tempfile: {path} is a folder; name a file to write")
    if weights.resolve() in (path.resolve(), *path.resolve().parents):
        raise UserError(f"teacher.tempfile: {path} is the teacher's; name another file to write")
    if total < 2:
        raise UserError("teacher.timestep_respacing: leaves one step; a pool is prepared for two or more")
    size = pool_size(settings.iter_choice, settings.BATCH, total, batch_size)
    identity = pool_identity(experiment, weights, size * world)
    if path.is_file() and overwrite:
        require_replaceable(path)
    elif path.is_file():
        read_pool(path, total, shape, expected=identity)
        if rank == 0:
            with suppress(UserError, OSError), held(path, patience=0.0):
                _remove_shares(path, "part")  # a stopped --overwrite may go on from its partial ones
        dist_util.say(f"{path} is already prepared for this configuration (--overwrite prepares it anew)")
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    with dist_util.held_by_rank_zero(path):
        if rank == 0:
            remove_leftovers(path.parent, path.name)
        belongs_to = identity | {
            "rows_per_call": settings.batch_size,
            "arithmetic": f"{teacher.network.compute_dtype} on {dist_util.dev().type}",
            "rank": f"{rank} of {world}",
        }
        partial = _partial_path(path, rank)
        found = _read_partial(partial, total, belongs_to, overwrite)
        if found is None:
            reseed(pool_seed(experiment), rank, 0)
            pool = noise_pool(teacher, size)
            goal = draw_goals(pool)
        else:
            pool = found[0].stored_on(dist_util.dev(), th.float32)
            goal = found[1].to(dist_util.dev())
        _require_room(path, shape, size * world, experiment)
        dist_util.say(
            f"preparing {size * world} samples on {world} rank(s), T = {total}, "
            f"stride {experiment.distill.stride}, seed {pool_seed(experiment)}"
        )
        with StopSignals() as signals:
            if not _denoise(pool, goal, teacher, experiment, signals):
                _write_partial(partial, pool, goal, belongs_to)
                raise Stopped(signals.reason)
            if dist_util.any_rank(not bool(pool.x.isfinite().all())):
                told = f"{weights}: the teacher gives no finite numbers{teacher.process.why_not_finite()}"
                raise UserError(f"{told}; no pool is written")
            _write(path, stored(pool, experiment), total, shape, identity)
    dist_util.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _require_room(
    path: Path, shape: tuple[int, int, int], samples: int, experiment: DistillationExperiment
) -> None:
    """Refuse at once what the disk cannot take in the end. Collective."""
    itemsize = getattr(th, experiment.distill.pool_dtype).itemsize
    copies = 1 if dist_util.world_size() == 1 else 2  # the ranks' parts, and what they are joined as
    needed, free = copies * samples * math.prod(shape) * itemsize, shutil.disk_usage(path.parent).free
    if dist_util.any_rank(needed > free):
        raise UserError(
            f"teacher.tempfile: {path} takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there"
        )


def _denoise(
    pool: DynamicBatch,
    goal: th.Tensor,
    teacher: Teacher,
    experiment: DistillationExperiment,
    signals: StopSignals,
) -> bool:
    """Take a pool to its goal, all ranks in step; False if a signal to any of them came before."""
    arrived = int((pool.levels == goal).sum())
    calls = prepare(pool, teacher, experiment.teacher.batch_size, experiment.distill.stride, goal)
    with Progress(
        len(pool), "preparing", "samples", initial=arrived, active=dist_util.rank() == 0
    ) as progress:
        while dist_util.any_rank((count := next(calls, None)) is not None):
            progress.advance(count or 0)
            if dist_util.any_rank(bool(signals.received)):
                return False
    return True


def _write(
    path: Path, pool: DynamicBatch, total: int, shape: tuple[int, int, int], identity: Mapping[str, Any]
) -> None:
    """Write all ranks' shares as one file, and remove what stopped preparations have left."""
    rank, world = dist_util.rank(), dist_util.world_size()
    write_pool(path if world == 1 else part_path(path, rank), [pool], identity)
    dist_util.barrier()
    with dist_util.rank_zero_first() as first:
        if first:
            if world > 1:
                join_parts(path, total, shape, identity, world)
            _remove_shares(path, "part", "partial")


def _remove_shares(path: Path, *kinds: str) -> None:
    """Remove what preparations that were killed ("part") or stopped ("partial") have left of a pool."""
    for kind in kinds:
        for left in path.parent.glob(f"{glob.escape(path.name)}.rank*.{kind}"):
            left.unlink()


def _partial_path(path: Path, rank: int) -> Path:
    """Where a rank leaves what it has when a preparation is stopped."""
    return Path(f"{path}.rank{rank}.partial")


def _write_partial(path: Path, pool: DynamicBatch, goal: th.Tensor, belongs_to: Mapping[str, Any]) -> None:
    """Write a rank's samples on their way, where they are going, and the state of its random numbers."""
    arrays = {"x": pool.x, "levels": pool.levels, "goal": goal, "random": th.get_rng_state()}
    if pool.y is not None:
        arrays["y"] = pool.y
    if dist_util.dev().type == "cuda":
        arrays["random_cuda"] = th.cuda.get_rng_state(dist_util.dev())
    write_arrays(path, "preparation", {name: array.cpu() for name, array in arrays.items()}, belongs_to)


def _read_partial(
    path: Path, total: int, belongs_to: Mapping[str, Any], overwrite: bool
) -> tuple[DynamicBatch, th.Tensor] | None:
    """What `_write_partial` wrote, random numbers going on from there; None where one has to begin.

    Raises:
        UserError: it is of another preparation, and may not be overwritten.
    """
    if not path.is_file():
        return None
    try:
        arrays, before = read_arrays(path, "preparation")
    except UserError as error:
        warn(f"{error}; preparing anew")
        return None
    changed = [
        f"{key} {before.get(key)!r}, now {v!r}" for key, v in belongs_to.items() if before.get(key) != v
    ]
    if changed:
        if overwrite:
            return None
        raise UserError(
            f"{path}: was left by another preparation ({'; '.join(changed)}): finish that one by its own "
            "command, or give --overwrite to begin anew"
        )
    th.set_rng_state(arrays["random"])
    if "random_cuda" in arrays:
        th.cuda.set_rng_state(arrays["random_cuda"], dist_util.dev())
    dist_util.say(f"continuing what {path} holds")
    return DynamicBatch(arrays["x"], arrays["levels"], total, arrays.get("y")), arrays["goal"]
