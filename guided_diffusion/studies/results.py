"""The results of a study: a file of lines of JSON, one a cell, that is only ever added to."""

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.files import held
from ..io.json_lines import append_line, read_lines
from ..io.progress import warn

# What every record has, and of which type; more is there for the report.
_HAS = {"id": str, "digest": str, "run": str, "budget": str, "seed": int, "spent": dict, "scores": list}
_HAS |= {"iterations": int, "seconds": dict, "flops": dict, "machine": dict}
_NUMBERS = {"seconds": ("preparation", "train"), "flops": ("preparation", "total")}
_MACHINE = {"cpu", "gpu", "cores", "threads", "jobs", "torch"}


class Results:
    """Records by the id of their cell.

    Args:
        own: the file that new records are added to.
        others: further files to read, such as results that came with the repository.
    """

    def __init__(self, own: Path, others: Sequence[Path] = ()):
        self.own, self.others = own, [path for path in others if path != own]
        self._lock = threading.Lock()

    def read(self) -> dict[str, dict[str, Any]]:
        """All records; of two of one cell the later. Other lines, as a kill leaves them, are left out."""
        found: dict[str, dict[str, Any]] = {}
        for path in (*self.others, self.own):
            if not path.is_file():
                continue
            for number, record in read_lines(path):
                if _is_record(record):
                    found[record["id"]] = record
                else:
                    warn(f"{path}:{number}: no record; left out")
        return found

    def append(self, record: dict[str, Any]) -> None:
        """Add one, whole or not at all, and see it on the disk; other processes may be adding to the file."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, held(self.own):
            append_line(self.own, plain(record), durable=True)


def _is_record(value: Any) -> bool:
    """Whether a line is a record, with all that a report reads of it."""
    if not (isinstance(value, dict) and all(isinstance(value.get(k), kind) for k, kind in _HAS.items())):
        return False
    numbers = [value[part].get(name) for part, names in _NUMBERS.items() for name in names]
    scores = value["scores"]
    return (
        all(_is_number(number) for number in [*numbers, *value["spent"].values()])
        and value["machine"].keys() >= _MACHINE
        and "revision" in value
        and bool(scores or "failed" in value)
        and all(isinstance(score, dict) and _has_primary(score) for score in scores)
    )


def _has_primary(score: Mapping[str, Any]) -> bool:
    """Whether scores have the one that runs are compared by, which may be null: it was not finite."""
    value = score.get("primary", "")
    return bool({"fd", "fid"} & score.keys()) and (value is None or _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def primary_name(scores: Mapping[str, Any]) -> str:
    """The score by which a study's runs are compared: "fd" (digits) or "fid"."""
    return next(name for name in ("fd", "fid") if name in scores)


def plain(value: Any) -> Any:
    """A record in JSON's types: numbers that are not finite become null, and others keep seven digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
