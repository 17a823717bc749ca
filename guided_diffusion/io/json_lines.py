"""Files of JSON, one value a line, to which lines are only ever added."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .json_text import parse_json


def append_line(path: Path, value: Any, *, durable: bool = False) -> None:
    """Add a line; one that a kill cut short before stays a line of its own.

    Args:
        path: the file; made if there is none.
        value: what to write.
        durable: return only when it is on the disk.
    """
    start = "" if not path.exists() or ends_whole(path) else "\n"
    with open(path, "ab") as file:
        file.write(f"{start}{json.dumps(value)}\n".encode())
        if durable:
            file.flush()
            os.fsync(file.fileno())


def ends_whole(path: Path) -> bool:
    """Whether a file's last line is whole, or there is none."""
    with open(path, "rb") as file, suppress(OSError):  # of an empty file
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
    return True


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """The number from 1 and the value of each line that is not empty; None for one that is no JSON."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line)
            except ValueError:
                yield number, None
