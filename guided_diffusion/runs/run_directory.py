"""Which directory a run writes to, and which checkpoint it goes on from."""

import argparse
import datetime
import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import dist_util
from ..config import paths
from ..config.loading import experiment_keys, load_experiment, read_mapping
from ..config.settings import DistillationExperiment, Experiment, dotted
from ..errors import UserError
from ..io.files import held
from ..io.remote import is_url, local_path, normalised
from .checkpoint import Checkpoint, Retention, newest_checkpoint, open_checkpoint
from .mirror import Mirror, fetch_checkpoint, run_url
from .run_record import began_from, images_of, read_record, record_of

_INCLUDES = ("model", "diffusion", "training", "base")  # which no resolved configuration has
_LONGEST = 80  # characters of a directory's name that say what the command line changes


@dataclass(frozen=True)
class Start:
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


def choose_start(
    kind: str, experiment: Experiment, args: argparse.Namespace, mirror: Mirror | None, lock: ExitStack
) -> Start:
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
        return Start(directory, has_been)
    try:
        earlier = _configuration_of(resume.directory, experiment)
    except (OSError, UserError):
        return Start(directory, has_been, resume)  # an original's run, which has none, or one not to be read
    _require_same_kind(earlier, experiment, resume.directory)
    before_flips, record = _before_flips(resume.directory, experiment), record_of(resume.directory)
    # Another number of ranks draws otherwise in any case, and leaves each other cores.
    threads, ranks = record.get("threads"), record.get("ranks")
    same_ranks = isinstance(ranks, list) and len(ranks) == dist_util.world_size()
    return Start(
        directory,
        has_been,
        resume,
        _changes(earlier, experiment, record, images_of(args)),
        before_flips and experiment.student.training.random_flip,
        threads if type(threads) is int and same_ranks else 0,
    )


def mirror_of(experiment: Experiment, args: argparse.Namespace) -> Mirror | None:
    """The copy that the run's directory has, if `--exp_dir`, or else `--resume_checkpoint`, is a URL."""
    wanted = named_checkpoint(experiment, args)
    if args.exp_dir is None and is_url(wanted):
        url = run_url(wanted)
    elif args.exp_dir is not None and is_url(args.exp_dir):
        url = args.exp_dir
    else:
        return None
    return Mirror(
        url, paths.remote_path(args.config), Retention.of(experiment.student.training, experiment.run)
    )


def named_checkpoint(experiment: Experiment, args: argparse.Namespace) -> str:
    """The checkpoint, or the run, from which the command or the configuration says to go on; "" for none."""
    return args.resume_checkpoint or experiment.student.training.resume_checkpoint


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
    own = mirror.directory if mirror else local_path(args.exp_dir).absolute() if args.exp_dir else None
    wanted = named_checkpoint(experiment, args)
    if wanted and not (mirror and is_url(wanted) and normalised(wanted) == mirror.url):
        named = _open_named(wanted, args.config)
        directory = _hold(own or named.directory, lock)
        if mirror:
            mirror.pull()
        latest = newest_checkpoint(directory)
        if latest is not None and latest.step > named.step:
            if began_from(directory) == wanted:  # the same command again
                return directory, latest
            raise UserError(
                f"{mirror.url if mirror else directory}: holds later checkpoints, up to step "
                f"{latest.step}, which would be taken for those of a run from step {named.step} on; "
                "give another --exp_dir, or move them away"
            )
        return directory, named
    if own is None:
        parent = paths.output_path(f"experiments/{kind}", args.config)
        found = _unfinished(parent, experiment, images_of(args), lock)
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
            # It may just have finished.
            if newest is not None and read_record(directory)["ended"] != "finished":
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
            record = read_record(directory)
            same_data = (data | record).get("data_dir") == data.get("data_dir")
            wanted = same_data and record["ended"] != "finished" and _is_of(directory, experiment)
        except (OSError, ValueError, UserError):
            continue  # not a run of ours
        if wanted:
            yield directory


def _configuration_of(directory: Path, experiment: Experiment) -> Experiment:
    """The resolved configuration of a run, to be compared with the present one.

    Raises:
        UserError: it is not readable, or names a class that the present one does not: what lies in a run's
            directory does not choose what is imported.
    """
    path = directory / "config.yaml"
    known = {str(value) for value in dotted(experiment_keys(experiment)).values()}
    for key, value in dotted(read_mapping(path)).items():
        name = key.rpartition(".")[2]
        is_class = name in ("architecture", "objective") and ":" in str(value)
        if name in _INCLUDES or (is_class and str(value) not in known):
            raise UserError(f"{path}: its {key} is not looked up")
    return load_experiment(path)


def _is_of(directory: Path, experiment: Experiment) -> bool:
    """Whether a run has this configuration; keys that its version did not know count as their defaults."""
    earlier = _configuration_of(directory, experiment)
    earlier.name = experiment.name
    if _before_flips(directory, experiment):
        earlier.student.training.random_flip = experiment.student.training.random_flip
    return earlier == experiment


def _changes(
    earlier: Experiment, experiment: Experiment, record: dict[str, Any], data: dict[str, str]
) -> str:
    """What a run that goes on has otherwise than it had: "section.key before -> now", ..., and its data."""
    before, now = (dotted(experiment_keys(one)) for one in (earlier, experiment))
    now |= data
    before |= {name: record.get(name, value) for name, value in data.items()}
    changed = [key for key in now if before.get(key) != now[key]]
    return ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)


def _before_flips(directory: Path, experiment: Experiment) -> bool:
    """Whether a run on images is of a version that did not mirror them (0.1.0)."""
    config = directory / "config.yaml"
    plain = not isinstance(experiment, DistillationExperiment)
    return plain and config.is_file() and "random_flip" not in config.read_text(errors="replace")
