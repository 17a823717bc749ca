"""A run from its start to its end: directory, record, log and copy are opened and closed in one place."""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .. import dist_util
from ..config.loading import experiment_keys, experiment_text
from ..config.settings import Experiment, dotted
from ..errors import UserError
from ..io.files import remove_leftovers, write_text
from ..logger import RunLog
from ..processes.stopping import Stopped, StoppedHere, StopSignals
from .checkpoint import Checkpoint
from .figures import save_curves
from .mirror import Mirror
from .run_directory import Start, choose_start, mirror_of, named_checkpoint, run_name
from .run_record import (
    began_from,
    images_of,
    new_record,
    record_of,
    starts,
    write_begun,
    write_end,
    write_finished,
)


@contextmanager
def start_run(
    kind: str, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[tuple[RunLog, Checkpoint | None]]:
    """Meet the other ranks, open the run's directory, and find what to continue from.

    The directory is `--exp_dir`, or for a URL the local one that it is a copy of; or that of
    `--resume_checkpoint`; or that of an unfinished run of the same configuration, so that the same
    command continues it; or a new experiments/KIND/NAME,CHANGES-TIME-XXXX: see `run_name`.
    Until the block ends no other run can write there.

    Args:
        kind: "kd" or "train", the folder under experiments/.
        experiment: the configuration; its resolved form is written to config.yaml.
        args: the command line's --config, key=value overrides, --exp_dir, --resume_checkpoint and --wandb.
        batch_size: of one rank.

    Yields:
        The record, and the checkpoint to continue from, if any. How the block ends is written to
        run.json: "finished", or why it did not, such as "stopped by SIGTERM at step 12".

    Raises:
        UserError: no such checkpoint, another run is writing to the directory, or its copy at a URL
            could not be reached at the start, or not be brought up to date at the end; or a rank has
            another configuration.
    """
    mirror = mirror_of(experiment, args)
    dist_util.setup_dist()
    dist_util.require_same(dotted(experiment_keys(experiment)))
    with ExitStack() as lock:
        start = dist_util.from_rank_zero(lambda: choose_start(kind, experiment, args, mirror, lock))
        if start.threads:
            dist_util.use_threads(start.threads)
        if start.before_flips:
            experiment.student.training.random_flip = False
        with (
            ExitStack() as ending,
            _copied(mirror),
            _recorded(start, experiment, args, batch_size) as log,
        ):
            if mirror is not None:
                log.publish = mirror.push
                log.info(f"copied to {mirror.url} with each checkpoint")
            if start.before_flips:
                log.info("the run began before images were mirrored at random, and goes on without")
            yield log, start.resume
            # A run that has finished is recorded and copied, whatever signal comes.
            ending.enter_context(StopSignals())


@contextmanager
def _copied(mirror: Mirror | None) -> Iterator[None]:
    """Bring the copy up to date when the block ends, whether it ends well or not.

    Raises:
        UserError: the block ended well, and the copy could not be. A block that failed fails as it did.
    """
    try:
        yield
    except (Exception, Stopped) as error:
        together = _together(error)
        if mirror is not None and (together or dist_util.rank() == 0):
            try:
                if together:
                    _push(mirror)
                else:
                    mirror.push()
            except UserError as failure:
                dist_util.warn(str(failure))
        raise
    if mirror is not None:
        _push(mirror)


@contextmanager
def _recorded(
    start: Start, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[RunLog]:
    """Open a run's record, and close it with the reason for which the block ended.

    What the run is (config.yaml, run.json) is written at once; but where a run has been, only when it goes on
    (`RunLog.begin`): of an attempt that is refused, the log alone tells. A new directory that nobody named
    does not outlive a mistake that is found before the first iteration.
    """
    launch, directory = dist_util.setup_dist(), start.directory
    is_new = args.exp_dir is None and start.resume is None
    try:
        log = RunLog(
            directory,
            active=launch.rank == 0,
            wandb=args.wandb,
            name=run_name(experiment.name, args.overrides),
            config=experiment_keys(experiment),
        )
    except UserError:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    devices = dist_util.describe()
    record = _facts(start, experiment, args, devices)
    if launch.rank == 0:
        remove_leftovers(directory)
    begun, trains, in_vain = False, False, False

    def begin(*, training: bool = True) -> None:
        nonlocal begun, trains
        trains = training
        if launch.rank == 0 and not begun:
            write_begun(directory, record)
            write_text(directory / "config.yaml", experiment_text(experiment))
        begun = True

    log.begin = begin
    if not start.has_been:
        begin(training=False)
    log.info(f"{experiment.name}: writing to {directory}")
    if start.changes:
        log.info(f"goes on with other settings than before: {start.changes}")
    for line in devices:
        log.info(line)
    log.info(
        f"{launch.world_size} rank(s) (launcher: {launch.launcher}), batch {batch_size} per rank, "
        f"{batch_size * launch.world_size} together"
    )
    try:
        yield log
    except BaseException as error:
        told = isinstance(error, (Stopped, UserError))
        reason = str(error) if told else repr(error)
        in_vain = launch.rank == 0 and is_new and isinstance(error, UserError) and not trains
        log.info(f"ended: {reason} (at its peak {dist_util.peak_memory()})")
        with log.tolerant():
            if begun and (launch.rank == 0 or not _together(error)):
                who = f"rank {launch.rank}: " if launch.rank else ""
                write_end(directory, record, who + reason)
        raise
    else:
        log.info(f"finished; at its peak {dist_util.peak_memory()}")
        if launch.rank == 0:
            write_finished(directory, record if begun else None)
    finally:
        with log.tolerant():
            if launch.rank == 0 and (directory / "progress.csv").exists():
                save_curves(directory / "curves.png", directory / "progress.csv", experiment.name)
        log.close()
        if in_vain:
            shutil.rmtree(directory, ignore_errors=True)


def _facts(
    start: Start, experiment: Experiment, args: argparse.Namespace, devices: list[str]
) -> dict[str, Any]:
    """What run.json says of a run that begins or goes on; all of it on rank 0."""
    directory = start.directory
    record = new_record(experiment.name, devices) | images_of(args)
    if dist_util.rank() != 0:
        return record
    wanted = named_checkpoint(experiment, args)
    own = start.resume is not None and start.resume.directory == directory
    names_itself = own and Path(wanted).suffix not in (".pt", ".safetensors")
    record["began_from"] = began_from(directory) if names_itself else wanted
    if start.resume is None or own:
        record["began_at"] = record_of(directory).get("began_at", 0)
    else:
        record["began_at"] = start.resume.step
    return record | starts(directory)


def _together(error: BaseException) -> bool:
    """Whether all ranks raise it; anything else may have befallen this one alone."""
    return isinstance(error, Stopped) and not isinstance(error, StoppedHere)


def _push(mirror: Mirror) -> None:
    """Bring a copy up to date, by rank 0; the others wait, so that none ends the job meanwhile.

    Raises:
        UserError: it could not be, on all ranks.
    """
    try:
        dist_util.from_rank_zero(mirror.push)
    except UserError as error:
        raise UserError(
            f"{mirror.url} is not up to date: {error}; all of it is in {mirror.directory}, "
            "and the same command tries again"
        ) from None
