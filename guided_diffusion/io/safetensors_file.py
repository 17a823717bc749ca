"""Safetensors files: a header of names, types, shapes and text, then plain numbers. None can run."""

import hashlib
import os
from collections.abc import Iterator, Mapping
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


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text in a file's header, by name; its tensors are not read.

    Raises:
        UserError: missing or damaged file.
    """
    with open_safetensors(path, "checkpoint") as file:
        return dict(file.metadata() or {})


def arrays_sha256(arrays: Mapping[str, th.Tensor]) -> str:
    """SHA-256 of named arrays on the CPU: names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {list(arrays[name].shape)}".encode())
        digest.update(arrays[name].contiguous().reshape(-1).view(th.uint8).numpy().data)
    return digest.hexdigest()


def require_checksum(file: Any, arrays: Mapping[str, th.Tensor]) -> None:
    """Compare a file's arrays with the `arrays_sha256` in its header; older files have none.

    Raises:
        ValueError: they differ.
    """
    checksum = (file.metadata() or {}).get("sha256")
    if checksum is not None and checksum != arrays_sha256(arrays):
        raise ValueError("its contents do not have their checksum")
