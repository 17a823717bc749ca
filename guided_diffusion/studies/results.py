"""The results of a study: a file of lines of JSON, one a cell, that is only ever added to."""

import json
import math
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.files import held


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
        """All records; of two of one cell the later. Lines that a kill cut short are left out."""
        found: dict[str, dict[str, Any]] = {}
        for path in (*self.others, self.own):
            if not path.is_file():
                continue
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    record = json.loads(line)
                    found[record["id"]] = record
                except (ValueError, KeyError, TypeError, RecursionError):
                    if line.strip():
                        print(f"WARNING: {path}:{number}: no record; left out", file=sys.stderr, flush=True)
        return found

    def append(self, record: dict[str, Any]) -> None:
        """Add one, whole or not at all, and see it on the disk; other processes may be adding to the file."""
        line = json.dumps(plain(record), allow_nan=False)
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, held(self.own), open(self.own, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = f"\n{line}"  # after one that was cut short
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def plain(value: Any) -> Any:
    """A record in JSON's types: numbers that are not finite become null, and others keep seven digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
