"""Read safetensors files: a header of names, types, shapes and text, then plain numbers. None can run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line


@contextmanager
def open_safetensors(path: str | os.PathLike, what: str) -> Iterator[Any]:
    """Open a file with `safe_open`; what is found damaged, in the block too, is told in one line.

    Args:
        path: the file.
        what: what it should be, for the message, such as "pool".

    Raises:
        UserError: missing or damaged file.
    """
    if not Path(path).is_file():
        raise UserError(f"no such {what}: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError, RecursionError, TypeError, LookupError) as error:
        told = first_line(error)
        raise UserError(f"{path}: not a readable {what} ({told})") from None


def read_safetensors(path: str | os.PathLike, what: str = "checkpoint") -> dict[str, th.Tensor]:
    """All tensors of a file, by name, on the CPU.

    They are copies: who truncates or unmounts the file later does not end the program.

    Raises:
        UserError: missing or damaged file.
    """
    with open_safetensors(path, what) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def read_metadata(path: str | os.PathLike, what: str = "checkpoint") -> dict[str, str]:
    """The text in a file's header, by name; its tensors are not read.

    Raises:
        UserError: missing or damaged file.
    """
    with open_safetensors(path, what) as file:
        return dict(file.metadata() or {})
