"""A run's directory: chosen, described and closed in one place."""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from . import cli, dist_util
from .checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from .config import experiment_text, project_root
from .errors import UserError
from .figures import save_curves
from .files import atomic_path, held, remove_leftovers
from .logger import RunLog
from .settings import Experiment
from .stopping import Stopped

_NOT_YET = "not yet"  # in run.json, while the run goes on


@contextmanager
def start_run(
    kind: str, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[tuple[RunLog, Checkpoint | None]]:
    """Meet the other ranks, open the run's directory, and find what to continue from.

    The directory is `--exp_dir`; or that of `--resume_checkpoint`; or that of an unfinished run of the
    same configuration, so that the same command continues it; or a new experiments/KIND/NAME-TIME.
    Until the block ends no other run can write there.

    Args:
        kind: "kd" or "train", the folder under experiments/.
        experiment: the configuration; its resolved form is written to config.yaml.
        args: the command line's --config, --exp_dir, --resume_checkpoint and --wandb.
        batch_size: of one rank.

    Yields:
        The record, and the checkpoint to continue from, if any. How the block ends is written to
        run.json: "finished", "stopped", or the error.

    Raises:
        UserError: no such checkpoint, or another run is writing to the directory.
    """
    dist_util.setup_dist()
    with ExitStack() as lock:
        directory, resume = _agree(kind, experiment, args, lock)
        with _recorded(directory, experiment, args, batch_size) as log:
            yield log, resume


@contextmanager
def _recorded(
    directory: Path, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[RunLog]:
    """Open a run's record, and close it with the reason for which the block ended."""
    launch = dist_util.setup_dist()
    log = RunLog(directory, active=launch.rank == 0, wandb=args.wandb, name=experiment.name)
    devices = dist_util.describe()
    record = _record(args.config, devices)
    if launch.rank == 0:
        remove_leftovers(directory)
        with atomic_path(directory / "config.yaml") as temporary:
            temporary.write_text(experiment_text(experiment))
        _write(directory, record | {"ended": _NOT_YET})
    log.info(f"{experiment.name}: writing to {directory}")
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
        log.info(f"ended: {reason}")
        with log.tolerant():
            if launch.rank == 0 or not isinstance(error, Stopped):
                who = f"rank {launch.rank}: " if launch.rank else ""
                _write_end(directory, record, who + reason)
        raise
    else:
        log.info("finished")
        if launch.rank == 0:
            _write(directory, record | {"ended": "finished"})
    finally:
        with log.tolerant():
            if launch.rank == 0 and (directory / "progress.csv").exists():
                save_curves(directory / "curves.png", directory / "progress.csv", experiment.name)
        log.close()


def _agree(
    kind: str, experiment: Experiment, args: argparse.Namespace, lock: ExitStack
) -> tuple[Path, Checkpoint | None]:
    """Rank 0's choice, on all ranks: others might find other files readable."""
    answer: Any = None
    if dist_util.rank() == 0:
        try:
            answer = _choose(kind, experiment, args, lock)
        except (UserError, OSError) as error:
            answer = str(error)
    answer = dist_util.broadcast_object(answer)
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _choose(
    kind: str, experiment: Experiment, args: argparse.Namespace, lock: ExitStack
) -> tuple[Path, Checkpoint | None]:
    """The run's directory, which `lock` holds from here on, and what to continue from."""
    wanted = args.resume_checkpoint or experiment.student.resume_checkpoint
    if wanted:
        found = [path for path in (Path(wanted), cli.output_path(wanted, args.config)) if path.exists()]
        named = open_checkpoint(found[0] if found else wanted)
        return _hold_first([args.exp_dir or named.directory], lock), named
    if args.exp_dir is not None:
        candidates = [args.exp_dir]
    else:
        parent = cli.output_path(f"experiments/{kind}", args.config)
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        candidates = [*_unfinished(parent, experiment), parent / f"{experiment.name}-{now}"]
    directory = _hold_first(candidates, lock)
    return directory, newest_checkpoint(directory)


def _hold_first(candidates: list[Path], lock: ExitStack) -> Path:
    """The first directory in which no other run is writing; made if missing.

    Raises:
        UserError: there is none.
    """
    for directory in candidates:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.enter_context(held(directory))
            return directory
        except UserError:
            if directory is candidates[-1]:
                raise
    raise AssertionError("no candidates")


def _unfinished(parent: Path, experiment: Experiment) -> list[Path]:
    """The runs of this very configuration that have a checkpoint and did not finish, the newest first."""
    text = experiment_text(experiment)
    found = []
    for directory in sorted(parent.glob(f"{experiment.name}-*"), reverse=True):
        try:
            same = (directory / "config.yaml").read_text() == text
            ended = _ended(directory)
        except (OSError, ValueError):
            continue  # not a run of ours, or one that never began
        if same and ended != "finished" and newest_checkpoint(directory) is not None:
            found.append(directory)
    return found


def _record(config: Path, devices: list[str]) -> dict[str, Any]:
    """What a run's results may depend on besides its configuration."""
    packages = ("torch", "numpy", "omegaconf", "safetensors", "mpi4py")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "command": sys.argv,
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "git_revision": _git_revision(project_root(config)),
        "versions": {"python": sys.version.split()[0]} | {p: installed.get(p) for p in packages},
        "ranks": devices,
    }


def _git_revision(folder: Path) -> str | None:
    """The commit checked out in a folder, "+changes" if files differ from it; None outside git."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _ended(directory: Path) -> str:
    """How a run ended, from its run.json.

    Raises:
        ValueError: the file does not say.
    """
    try:
        return str(json.loads((directory / "run.json").read_text())["ended"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record of a run ({error})") from None


def _write_end(directory: Path, record: dict[str, Any], reason: str) -> None:
    """Record why a run ended, unless a rank did already: the first reason is the cause of the others."""
    try:
        first = _ended(directory) == _NOT_YET
    except (OSError, ValueError):
        first = True
    if first:
        _write(directory, record | {"ended": reason})


def _write(directory: Path, record: dict[str, Any]) -> None:
    with atomic_path(directory / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))
