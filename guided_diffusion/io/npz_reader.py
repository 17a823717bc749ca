"""npz archives that are checked before they are believed."""

import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from ..errors import UserError, first_line
from .json_text import parse_json

# What the zip and npy readers raise on damaged or foreign contents.
_DAMAGE = (
    *(ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError),
    *(RuntimeError, SyntaxError, MemoryError),  # encrypted, too deeply nested; a header beyond parsing
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)
# An entry that unfolds into more than this must not be this many times larger than it is in the file.
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 200
_MAX_TEXT = 1 << 20  # characters


class NpzFile:
    """Read-only view of an `.npz` archive that knows every array's shape before loading any.

    Args:
        path: the archive.

    Raises:
        UserError: missing, truncated or not a zip archive, an entry that is no plain array (object
            arrays, which could run code when unpickled, are refused), or one that unfolds absurdly.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder, and an npz file is wanted")
        if not self.path.is_file():
            raise UserError(f"no such file: {self.path}")
        self.headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for member in archive.infolist():
                    if not member.filename.endswith(".npy"):
                        raise ValueError(f"entry {member.filename[:60]!r} is no array")
                    if member.header_offset + member.compress_size > self.path.stat().st_size:
                        raise ValueError(f"entry {member.filename} is larger than the file")
                    if member.file_size > max(_BOMB_BYTES, _BOMB_RATIO * member.compress_size):
                        raise ValueError(f"entry {member.filename} unfolds into {member.file_size} bytes")
                    with archive.open(member) as stream:
                        shape, dtype = _read_header(stream)
                        header = stream.tell()
                    if dtype.hasobject or not dtype.itemsize or any(n < 0 for n in shape):
                        raise ValueError(f"entry {member.filename} is no plain array")
                    if header + math.prod(shape) * dtype.itemsize != member.file_size:
                        raise ValueError(f"entry {member.filename} is no array of {shape}")
                    self.headers[member.filename.removesuffix(".npy")] = (shape, dtype)
        except _DAMAGE as error:
            raise UserError(f"{self.path}: not a readable npz archive ({first_line(error)})") from None

    def require(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of an array that must be there.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.headers:
            have = ", ".join(sorted(self.headers)) or "nothing"
            raise UserError(f"{self.path}: has no array '{name}' (it holds: {have})")
        return self.headers[name]

    def load(self, name: str) -> np.ndarray:
        """The whole array.

        Raises:
            UserError: there is none of that name, or the file is damaged.
        """
        self.require(name)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                array = npy_format.read_array(stream, allow_pickle=False)
                stream.read(1)  # at the end zipfile compares the checksum
                return array
        except _DAMAGE as error:
            raise UserError(f"{self.path}: damaged archive ({first_line(error)})") from None

    def load_json(self, name: str) -> dict[str, Any]:
        """The JSON object that an array [] of one string holds.

        Raises:
            UserError: no such array, or it is no JSON object (which has no NaN), or a very long one.
        """
        shape, dtype = self.require(name)
        try:
            if shape or dtype.kind != "U" or dtype.itemsize > 4 * _MAX_TEXT:
                raise ValueError(f"it is {dtype} {list(shape)}, not a string of up to {_MAX_TEXT} characters")
            # Not by numpy, to which characters beyond Unicode are an error of its own.
            encoding = "utf-32-be" if dtype.str.startswith(">") else "utf-32-le"
            found = parse_json(self.load(name).tobytes().decode(encoding).rstrip("\0"))
            json.dumps(found, allow_nan=False)
            if not isinstance(found, dict):
                raise ValueError(f"it is a {type(found).__name__}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: '{name}' holds no JSON object ({first_line(error)})") from None
        return found

    def stream(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """Yield the array in blocks of at most `rows` rows, decompressing as it goes.

        Raises:
            UserError: there is none of that name, it has no rows, or the file is damaged.
        """
        shape, dtype = self.require(name)
        if not shape:
            raise UserError(f"{self.path}: array '{name}' is a single number, rows were expected")
        row_shape = shape[1:]
        row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
                _read_header(stream)
                for start in range(0, shape[0], rows):
                    count = min(rows, shape[0] - start)
                    data = stream.read(count * row_bytes)
                    if len(data) != count * row_bytes:
                        raise EOFError(f"array '{name}' ends after {start} of {shape[0]} rows")
                    yield np.frombuffer(data, dtype).reshape(count, *row_shape).copy()
                stream.read(1)  # at the end zipfile compares the checksum
        except _DAMAGE as error:
            raise UserError(f"{self.path}: damaged archive ({first_line(error)})") from None


def _read_header(stream) -> tuple[tuple[int, ...], np.dtype]:
    version = npy_format.read_magic(stream)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    if fortran_order:
        raise ValueError("a Fortran-ordered array; save it with numpy.ascontiguousarray")
    return shape, dtype
