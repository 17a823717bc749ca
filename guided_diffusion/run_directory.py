"""A run's directory: made, described and closed in one place."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import cli, dist_util
from .checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from .config import save_experiment
from .figures import save_curves
from .logger import RunLog
from .settings import Experiment


@contextmanager
def start_run(
    kind: str, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[tuple[RunLog, Checkpoint | None]]:
    """Meet the other ranks, open the run's directory, and find what to continue from.

    Args:
        kind: "kd" or "train", the folder under experiments/.
        experiment: the configuration; its resolved form is written to config.yaml.
        args: the command line's --config, --exp_dir, --resume_checkpoint and --wandb.
        batch_size: of one rank.

    Yields:
        The record, and the checkpoint to continue from: `--resume_checkpoint`'s, else the
        configuration's, else the newest of an `--exp_dir` that was there before.

    Raises:
        UserError: no such checkpoint.
    """
    launch = dist_util.setup_dist()
    wanted = args.resume_checkpoint or experiment.student.resume_checkpoint
    if wanted:
        found = [path for path in (Path(wanted), cli.output_path(wanted, args.config)) if path.exists()]
        named = open_checkpoint(found[0] if found else wanted)
        resume: Checkpoint | None = named
        directory = args.exp_dir or named.directory
    else:
        directory = dist_util.broadcast_object(cli.run_directory(kind, experiment, args.config, args.exp_dir))
        resume = newest_checkpoint(directory) if directory.is_dir() else None
    dist_util.barrier()  # all ranks have looked before rank 0 writes
    log = RunLog(directory, active=launch.rank == 0, wandb=args.wandb, name=experiment.name)
    if launch.rank == 0:
        save_experiment(experiment, directory / "config.yaml")
    log.info(f"{experiment.name}: writing to {directory}")
    for line in dist_util.describe():
        log.info(line)
    log.info(
        f"{launch.world_size} rank(s) (launcher: {launch.launcher}), batch {batch_size} per rank, "
        f"{batch_size * launch.world_size} together"
    )
    yield log, resume
    if launch.rank == 0 and (directory / "progress.csv").exists():
        save_curves(directory / "curves.png", directory / "progress.csv", experiment.name)
    log.info("finished")
    log.close()
