"""run.json, the record of a run: what it computes with, when it started and went on, how it ended."""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..io.files import read_object, write_text
from ..io.shipped import installed_versions
from .provenance import git_revision

_NOT_YET = "not yet"  # how a run ended, while it goes on


def read_record(directory: Path) -> dict[str, Any]:
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


def record_of(directory: Path) -> dict[str, Any]:
    """A directory's run.json; {} if it has none."""
    try:
        return read_record(directory)
    except (OSError, ValueError):
        return {}


def new_record(name: str, devices: list[str]) -> dict[str, Any]:
    """What a run's results may depend on besides its configuration; `devices`: a line per rank."""
    return {
        "name": name,
        "command": sys.argv,
        "git_revision": git_revision(),
        "versions": installed_versions("torch", "numpy", "omegaconf", "safetensors", "mpi4py"),
        "ranks": devices,
        "threads": th.get_num_threads(),
    }


def images_of(args: argparse.Namespace) -> dict[str, str]:
    """The images that a run trains on (`--data_dir`), for its record; {} if it is a distillation."""
    return {"data_dir": str(Path(args.data_dir).resolve())} if getattr(args, "data_dir", None) else {}


def starts(directory: Path) -> dict[str, Any]:
    """When the run in a directory first started, and when it was resumed, this time included; local times."""
    if not (earlier := record_of(directory)):
        return {"started": _now(), "resumed": []}
    return {"started": earlier["started"], "resumed": [*earlier.get("resumed", []), _now()]}


def began_from(directory: Path) -> str:
    """The checkpoint, as it was named, that the run in a directory began from; "" if from none."""
    return str(record_of(directory).get("began_from", ""))


def write_begun(directory: Path, record: dict[str, Any]) -> None:
    """Record that a run goes on."""
    _write(directory, record | {"ended": _NOT_YET})


def write_end(directory: Path, record: dict[str, Any], reason: str) -> None:
    """Record why a run ended early, unless a rank did: the first reason is the cause of the others."""
    present = record_of(directory) or record | {"ended": _NOT_YET}
    if present["ended"] == _NOT_YET:
        _write(directory, present | _ending(reason))


def write_finished(directory: Path, record: dict[str, Any] | None) -> None:
    """Record that a run has finished; if it had nothing left to do (None), unless it is known already."""
    record = record or record_of(directory)  # an original's run has none
    if record and record.get("ended") != "finished":
        _write(directory, record | _ending("finished"))


def _ending(reason: str) -> dict[str, str]:
    """What is added to a run's record when it ends."""
    return {"ended": reason, "ended_at": _now(), "peak_memory": dist_util.peak_memory()}


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def _write(directory: Path, record: dict[str, Any]) -> None:
    write_text(directory / "run.json", json.dumps(record, indent=1))
