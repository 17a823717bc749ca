"""Safetensors files: a header of names, types, shapes and text, then plain numbers. None can run."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError, first_line
from .files import atomic_path
from .json_text import parse_json


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


def write_arrays(
    path: str | os.PathLike, what: str, arrays: Mapping[str, th.Tensor], about: Mapping[str, Any]
) -> None:
    """Write named arrays, which are on the CPU, and `about`, what the file says of itself; atomically.

    The header has `about` as JSON under the name `what`, and a checksum of the arrays.
    """
    header = {what: json.dumps(dict(about)), "sha256": _arrays_sha256(arrays)}
    with atomic_path(path) as temporary:
        save_file(dict(arrays), temporary, metadata=header)


def read_arrays(path: str | os.PathLike, what: str) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    """The arrays that `write_arrays` wrote, which are the mapped file, and what it says of itself or {}.

    Raises:
        UserError: missing or damaged file.
    """
    with open_safetensors(path, what) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = (file.metadata() or {}).get("sha256")  # older files have none
        if checksum is not None and checksum != _arrays_sha256(arrays):
            raise ValueError("its contents do not have their checksum")
        return arrays, _about(file, what)


def read_about(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """What a file of `write_arrays` says of itself; its arrays are not read.

    Raises:
        UserError: missing or damaged file.
    """
    with open_safetensors(path, what) as file:
        return _about(file, what)


def _about(file: Any, what: str) -> dict[str, Any]:
    about = parse_json((file.metadata() or {}).get(what, "{}"))
    if not isinstance(about, dict):
        raise ValueError("its header does not say what it belongs to")
    return about


def _arrays_sha256(arrays: Mapping[str, th.Tensor]) -> str:
    """SHA-256 of named arrays on the CPU: names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {list(arrays[name].shape)}".encode())
        digest.update(arrays[name].contiguous().reshape(-1).view(th.uint8).numpy().data)
    return digest.hexdigest()
