"""Write an `.npz` of images batch by batch: any number of rows in the memory of one batch."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from .files import atomic_path

_HEADER_BYTES = 128  # of the npy header, fixed so that the number of rows can be filled in last
_CRC_POLYNOMIAL = 0xEDB88320  # CRC-32 of the zip format, bits reflected: x^0 is the highest bit


class NpzWriter:
    """Receives batches of rows for `arr_0` and, optionally, their labels for `arr_1`.

    Made by `create_npz`. `count` is the number of rows so far.
    """

    def __init__(self, member: IO[bytes]):
        self.count = 0
        self._member = member
        self._row_shape: tuple[int, ...] | None = None
        self._dtype: np.dtype | None = None
        self._labels: list[np.ndarray] = []
        self._bytes = self._crc = 0
        member.write(bytes(_HEADER_BYTES))

    def append(self, batch: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add rows.

        Args:
            batch: [n, ...], of the first batch's dtype and row shape; images: uint8 [n, H, W, 3].
            labels: integers [n], with every batch or with none.

        Raises:
            ValueError: a batch unlike the first one.
        """
        if self._dtype is None:
            self._row_shape, self._dtype = batch.shape[1:], batch.dtype
        elif (batch.shape[1:], batch.dtype) != (self._row_shape, self._dtype):
            raise ValueError(
                f"rows of {batch.dtype} {batch.shape[1:]} after rows of {self._dtype} {self._row_shape}"
            )
        if labels is not None and labels.shape != batch.shape[:1]:
            raise ValueError(f"{labels.shape} labels for {batch.shape[0]} rows")
        if (labels is not None) != bool(self._labels) and self.count:
            raise ValueError("labels must come with every batch or with none")
        if labels is not None:
            self._labels.append(labels.astype(np.int64))
        data = np.ascontiguousarray(batch).data.cast("B") if batch.size else b""
        self._member.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._bytes += len(data)
        self.count += len(batch)

    def header(self) -> bytes:
        """The npy header of the rows so far, `_HEADER_BYTES` long (npy format 1.0)."""
        if self._dtype is None or self._row_shape is None:
            raise ValueError("no batch was appended: an npz file needs at least one")
        shape = (self.count, *(int(n) for n in self._row_shape))
        descr = npy_format.dtype_to_descr(self._dtype)
        text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
        room = _HEADER_BYTES - npy_format.MAGIC_LEN - 2
        if len(text) >= room:
            raise ValueError(f"rows of shape {self._row_shape} have too many dimensions")
        return (
            npy_format.magic(1, 0) + struct.pack("<H", room) + text.ljust(room - 1).encode("latin-1") + b"\n"
        )

    def checksum(self) -> int:
        """CRC-32 of the whole member, header included, without reading it back."""
        return _crc_shifted(zlib.crc32(self.header()), self._bytes) ^ self._crc

    def labels(self) -> np.ndarray | None:
        """int64 [count], or None when no batch had any."""
        return np.concatenate(self._labels) if self._labels else None


@contextmanager
def create_npz(path: str | os.PathLike) -> Iterator[NpzWriter]:
    """Give a writer whose batches go straight into the uncompressed `arr_0` of a new archive.

    The same batches make the same bytes. The file appears under its name only when the block ends
    without an error, and being uncompressed it can be memory-mapped (`image_datasets`).

    Raises:
        ValueError: nothing was appended.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb+") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        info = zipfile.ZipInfo("arr_0.npy")
        with archive.open(info, "w", force_zip64=True) as member:
            writer = NpzWriter(member)
            yield writer
        # Only now is the number of rows known: fill in the npy header and both copies of its CRC.
        info.CRC = writer.checksum()
        file.seek(info.header_offset + 14)
        file.write(struct.pack("<L", info.CRC))
        file.seek(member_data_offset(file, info))
        file.write(writer.header())
        if (labels := writer.labels()) is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                npy_format.write_array(member, labels, allow_pickle=False)


def member_data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where an archive member's own bytes start in `file`, after its local header."""
    file.seek(info.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name_bytes + extra_bytes


def _crc_shifted(crc: int, count: int) -> int:
    """What `crc` becomes after `count` zero bytes: crc * x^(8 count) modulo the polynomial."""
    power = 1 << 23  # x^8
    while count:
        if count & 1:
            crc = _product(crc, power)
        power = _product(power, power)
        count >>= 1
    return crc


def _product(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_CRC_POLYNOMIAL if b & 1 else 0)
    return product
