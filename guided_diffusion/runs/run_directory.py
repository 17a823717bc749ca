"""A run's directory: chosen, described and closed in one place."""

import argparse
import datetime
import hashlib
import json
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config import paths
from ..config.loading import experiment_keys, experiment_text, load_experiment
from ..config.settings import DistillationExperiment, Experiment
from ..errors import UserError
from ..io.files import held, read_object, remove_leftovers, write_text
from ..io.progress import warn
from ..io.remote import is_url, local_path, normalised
from ..io.shipped import installed_versions
from ..logger import RunLog
from ..processes.stopping import Stopped, StoppedHere, StopSignals
from .checkpoint import Checkpoint, Retention, newest_checkpoint, open_checkpoint
from .figures import save_curves
from .mirror import Mirror, fetch_checkpoint, run_url
from .provenance import git_revision

_NOT_YET = "not yet"  # in run.json, while the run goes on
_LONGEST = 80  # characters of a directory's name that say what the command line changes


@dataclass(frozen=True)
class _Start:
    """Where a run is, and how it goes on.

    Attributes:
        directory: the run's, in which no other run is writing.
        has_been: whether there is a record of a run.
        resume: what to continue from, or None.
        changes: what is configured otherwise than before, as text.
        before_flips: whether the run is of a version that did not mirror images.
        threads: that it computes with; 0 if that is free.
    """

    directory: Path
    has_been: bool
    resume: Checkpoint | None = None
    changes: str = ""
    before_flips: bool = False
    threads: int = 0


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
        run.json: "finished", "stopped", or the error.

    Raises:
        UserError: no such checkpoint, another run is writing to the directory, or its copy at a URL
            could not be reached at the start, or not be brought up to date at the end.
    """
    mirror = _mirror(experiment, args)
    dist_util.setup_dist()
    with ExitStack() as lock:
        start = dist_util.from_rank_zero(lambda: _choose(kind, experiment, args, mirror, lock))
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


def _mirror(experiment: Experiment, args: argparse.Namespace) -> Mirror | None:
    """The copy that the run's directory has, if `--exp_dir`, or else `--resume_checkpoint`, is a URL."""
    wanted = _named_checkpoint(experiment, args)
    if args.exp_dir is None and is_url(wanted):
        url = run_url(wanted)
    elif args.exp_dir is not None and is_url(args.exp_dir):
        url = args.exp_dir
    else:
        return None
    return Mirror(
        url, paths.remote_path(args.config), Retention.of(experiment.student.training, experiment.run)
    )


def _named_checkpoint(experiment: Experiment, args: argparse.Namespace) -> str:
    """The checkpoint, or the run, from which the command or the configuration says to go on; "" for none."""
    return args.resume_checkpoint or experiment.student.training.resume_checkpoint


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
                if dist_util.rank() == 0:
                    warn(str(failure))
        raise
    if mirror is not None:
        _push(mirror)


@contextmanager
def _recorded(
    start: _Start, experiment: Experiment, args: argparse.Namespace, batch_size: int
) -> Iterator[RunLog]:
    """Open a run's record, and close it with the reason for which the block ended.

    What the run is (config.yaml, run.json) is written at once; but where a run has been, only when it goes on
    (`RunLog.begin`): of an attempt that is refused, the log alone tells. A new directory that nobody named
    does not outlive a mistake that is found before the first iteration.
    """
    launch, directory = dist_util.setup_dist(), start.directory
    log = RunLog(
        directory,
        active=launch.rank == 0,
        wandb=args.wandb,
        name=run_name(experiment.name, args.overrides),
        config=experiment_keys(experiment),
    )
    devices = dist_util.describe()
    record = _record(experiment.name, devices) | _data(args)
    if launch.rank == 0:
        remove_leftovers(directory)
        record |= _starts(directory)
        wanted = _named_checkpoint(experiment, args)
        own = start.resume is not None and start.resume.directory == directory
        names_itself = own and Path(wanted).suffix not in (".pt", ".safetensors")
        record["began_from"] = _began_from(directory) if names_itself else wanted
    begun, trains, in_vain = False, False, False

    def begin(*, training: bool = True) -> None:
        nonlocal begun, trains
        trains = training
        if launch.rank == 0 and not begun:
            _write(directory, record | {"ended": _NOT_YET})
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
        is_new = args.exp_dir is None and start.resume is None
        in_vain = launch.rank == 0 and is_new and isinstance(error, UserError) and not trains
        log.info(f"ended: {reason} (at its peak {dist_util.peak_memory()})")
        with log.tolerant():
            if begun and (launch.rank == 0 or not _together(error)):
                who = f"rank {launch.rank}: " if launch.rank else ""
                _write_end(directory, record, who + reason)
        raise
    else:
        log.info(f"finished; at its peak {dist_util.peak_memory()}")
        if launch.rank == 0:
            _write_finished(directory, record if begun else None)
    finally:
        with log.tolerant():
            if launch.rank == 0 and (directory / "progress.csv").exists():
                save_curves(directory / "curves.png", directory / "progress.csv", experiment.name)
        log.close()
        if in_vain:
            shutil.rmtree(directory, ignore_errors=True)


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


def _choose(
    kind: str, experiment: Experiment, args: argparse.Namespace, mirror: Mirror | None, lock: ExitStack
) -> _Start:
    """Where to begin; `lock` holds the directory from here on.

    Raises:
        UserError: as `start_run`, or the directory is of something else.
    """
    directory, resume = _find(kind, experiment, args, mirror, lock)
    has_been = (directory / "run.json").is_file()
    is_of_a_run = has_been or (resume is not None and resume.directory == directory)
    if (directory / "config.yaml").is_file() and not is_of_a_run:
        raise UserError(
            f"{directory}: its config.yaml is not a run's, and would be replaced; give another --exp_dir"
        )
    if resume is None:
        return _Start(directory, has_been)
    try:
        earlier = load_experiment(resume.directory / "config.yaml")
    except (OSError, UserError):
        return _Start(directory, has_been, resume)  # an original's run, which has none
    _require_same_kind(earlier, experiment, resume.directory)
    before_flips, record = _before_flips(resume.directory, experiment), _record_of(resume.directory)
    # Another number of ranks draws otherwise in any case, and leaves each other cores.
    threads, ranks = record.get("threads"), record.get("ranks")
    same_ranks = isinstance(ranks, list) and len(ranks) == dist_util.world_size()
    return _Start(
        directory,
        has_been,
        resume,
        _changes(earlier, experiment, record, _data(args)),
        before_flips and experiment.student.training.random_flip,
        threads if type(threads) is int and same_ranks else 0,
    )


def _require_same_kind(earlier: Experiment, now: Experiment, directory: Path) -> None:
    """Raise `UserError` if a distillation is to go on as a training on images, or the other way."""
    was_distilled, is_distilled = (isinstance(one, DistillationExperiment) for one in (earlier, now))
    if was_distilled != is_distilled:
        kind, script = (
            ("a distillation", "image_kd.py") if was_distilled else ("a training on images", "image_train.py")
        )
        raise UserError(
            f"{directory}: is {kind}, which {script} continues; to begin from its weights instead, give "
            "student.model_path and another --exp_dir"
        )


def _find(
    kind: str, experiment: Experiment, args: argparse.Namespace, mirror: Mirror | None, lock: ExitStack
) -> tuple[Path, Checkpoint | None]:
    own = mirror.directory if mirror else local_path(args.exp_dir) if args.exp_dir else None
    wanted = _named_checkpoint(experiment, args)
    if wanted and not (mirror and is_url(wanted) and normalised(wanted) == mirror.url):
        named = _open_named(wanted, args.config)
        directory = _hold(own or named.directory, lock)
        if mirror:
            mirror.pull()
        latest = newest_checkpoint(directory)
        if latest is not None and latest.step > named.step:
            if _began_from(directory) == wanted:  # the same command again
                return directory, latest
            raise UserError(
                f"{mirror.url if mirror else directory}: holds later checkpoints, up to step "
                f"{latest.step}, which would be taken for those of a run from step {named.step} on; "
                "give another --exp_dir, or move them away"
            )
        return directory, named
    if own is None:
        parent = paths.output_path(f"experiments/{kind}", args.config)
        found = _unfinished(parent, experiment, _data(args), lock)
        return found or (_new_directory(parent, run_name(experiment.name, args.overrides), lock), None)
    directory = _hold(own, lock)
    newest = mirror.pull() if mirror else newest_checkpoint(directory)
    if wanted and newest is None:
        raise UserError(f"{wanted}: holds no complete checkpoint")
    return directory, newest


def _open_named(wanted: str, config: Path) -> Checkpoint:
    """The checkpoint that --resume_checkpoint, or the key of that name, means."""
    if is_url(wanted):
        return fetch_checkpoint(wanted, paths.fetched_path(config))
    found = [path for path in (Path(wanted), paths.output_path(wanted, config)) if path.exists()]
    return open_checkpoint(found[0] if found else wanted)


def run_name(name: str, overrides: Sequence[str]) -> str:
    """A name that tells a study's runs apart: the configuration's, and what the command line changes.

    Args:
        name: the configuration's.
        overrides: "section.key=value", ...; the section is left out where the key alone says enough.

    Returns:
        Such as "cifar10,lr=1e-3,seed=1", of letters that every file system takes; what is too long ends
        in a hash instead.
    """
    pairs = [override.partition("=")[::2] for override in overrides]
    short = [key.rpartition(".")[2] for key, _ in pairs]
    changes = ""
    for (key, value), last in zip(pairs, short, strict=True):
        value = re.sub(r"[^\w.+-]+", "-", value.rpartition("/")[2], flags=re.ASCII)
        changes += f",{last if short.count(last) == 1 else key}={value}"
    if len(changes) > _LONGEST:
        changes = f"{changes[: _LONGEST - 9]}-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    return name + changes


def _hold(directory: Path, lock: ExitStack) -> Path:
    """A directory, made if missing, in which no other run is writing; one that is ending is waited for.

    Raises:
        UserError: another run is writing there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock.enter_context(held(directory))
    return directory


def _new_directory(parent: Path, name: str, lock: ExitStack) -> Path:
    """A directory that no other run has, however many start in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        directory = parent / f"{name}-{now}-{secrets.token_hex(2)}"
        with suppress(FileExistsError):
            directory.mkdir()
            lock.enter_context(held(directory, patience=0))
            return directory


def _unfinished(
    parent: Path, experiment: Experiment, data: dict[str, str], lock: ExitStack
) -> tuple[Path, Checkpoint] | None:
    """The newest run of this configuration and data that has a checkpoint, did not finish, and is not going
    on.
    """
    for directory in _of_configuration(parent, experiment, data):
        with ExitStack() as attempt:
            try:
                attempt.enter_context(held(directory, patience=0))
            except (UserError, PermissionError):
                continue  # another process's, or another user's
            newest = newest_checkpoint(directory)
            if newest is not None and _read(directory)["ended"] != "finished":  # it may just have done so
                lock.enter_context(attempt.pop_all())
                return directory, newest
    return None


def _of_configuration(parent: Path, experiment: Experiment, data: dict[str, str]) -> Iterator[Path]:
    """Yield the runs of this very configuration and data that did not finish, the newest first."""
    begun = []
    for directory in parent.iterdir() if parent.is_dir() else ():
        if directory.name.startswith((f"{experiment.name}-", f"{experiment.name},")):
            with suppress(OSError):  # one that never began
                begun.append(((directory / "run.json").stat().st_mtime, directory))
    for _, directory in sorted(begun, reverse=True):
        try:
            record = _read(directory)
            same_data = (data | record).get("data_dir") == data.get("data_dir")
            wanted = same_data and record["ended"] != "finished" and _is_of(directory, experiment)
        except (OSError, ValueError, UserError):
            continue  # not a run of ours
        if wanted:
            yield directory


def _is_of(directory: Path, experiment: Experiment) -> bool:
    """Whether a run has this configuration; keys that its version did not know count as their defaults."""
    earlier = load_experiment(directory / "config.yaml")
    earlier.name = experiment.name
    if _before_flips(directory, experiment):
        earlier.student.training.random_flip = experiment.student.training.random_flip
    return earlier == experiment


def _changes(
    earlier: Experiment, experiment: Experiment, record: dict[str, Any], data: dict[str, str]
) -> str:
    """What a run that goes on has otherwise than it had: "section.key before -> now", ..., and its data."""
    before, now = (
        {
            f"{name}.{key}": found
            for name, section in experiment_keys(one).items()
            for key, found in (section if isinstance(section, dict) else {"": section}).items()
        }
        for one in (earlier, experiment)
    )
    now |= data
    before |= {name: record.get(name, value) for name, value in data.items()}
    changed = [key for key in now if before.get(key) != now[key]]
    return ", ".join(f"{key.rstrip('.')} {before.get(key)} -> {now[key]}" for key in changed)


def _before_flips(directory: Path, experiment: Experiment) -> bool:
    """Whether a run on images is of a version that did not mirror them (0.1.0)."""
    config = directory / "config.yaml"
    plain = not isinstance(experiment, DistillationExperiment)
    return plain and config.is_file() and "random_flip" not in config.read_text(errors="replace")


def _record(name: str, devices: list[str]) -> dict[str, Any]:
    """What a run's results may depend on besides its configuration."""
    return {
        "name": name,
        "command": sys.argv,
        "git_revision": git_revision(),
        "versions": installed_versions("torch", "numpy", "omegaconf", "safetensors", "mpi4py"),
        "ranks": devices,
        "threads": th.get_num_threads(),
    }


def _data(args: argparse.Namespace) -> dict[str, str]:
    """The images that a run trains on, for its record; {} if it is a distillation."""
    return {"data_dir": str(Path(args.data_dir).resolve())} if getattr(args, "data_dir", None) else {}


def _starts(directory: Path) -> dict[str, Any]:
    """When the run in a directory first started, and when it was started again."""
    if not (earlier := _record_of(directory)):
        return {"started": _now(), "resumed": []}
    return {"started": earlier["started"], "resumed": [*earlier.get("resumed", []), _now()]}


def _began_from(directory: Path) -> str:
    """The checkpoint, as it was named, that the run in a directory began from; "" if from none."""
    return str(_record_of(directory).get("began_from", ""))


def _record_of(directory: Path) -> dict[str, Any]:
    """A directory's run.json; {} if it has none."""
    try:
        return _read(directory)
    except (OSError, ValueError):
        return {}


def _write_end(directory: Path, record: dict[str, Any], reason: str) -> None:
    """Record why a run ended, unless a rank did already: the first reason is the cause of the others."""
    present = _record_of(directory) or record | {"ended": _NOT_YET}
    if present["ended"] == _NOT_YET:
        _write(directory, present | _ending(reason))


def _write_finished(directory: Path, record: dict[str, Any] | None) -> None:
    """Record that a run has finished; if it had nothing left to do (None), unless it is known already."""
    record = record or _record_of(directory)  # an original's run has none
    if record and record.get("ended") != "finished":
        _write(directory, record | _ending("finished"))


def _ending(reason: str) -> dict[str, str]:
    """What is added to a run's record when it ends."""
    return {"ended": reason, "ended_at": _now(), "peak_memory": dist_util.peak_memory()}


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def _read(directory: Path) -> dict[str, Any]:
    """A directory's run.json.

    Raises:
        ValueError: it is no record of a run; or OSError.
    """
    record = read_object(directory / "run.json")
    if not (
        isinstance(record.get("started"), str)
        and isinstance(record.get("ended"), str)
        and isinstance(record.get("resumed", []), list)
    ):
        raise ValueError("not a record of a run")
    return record


def _write(directory: Path, record: dict[str, Any]) -> None:
    write_text(directory / "run.json", json.dumps(record, indent=1))
