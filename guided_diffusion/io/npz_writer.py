"""Write an `.npz` of images batch by batch: any number of rows in the memory of one batch."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from .files import atomic_path


class NpzWriter:
    """Receives batches of rows for `arr_0` and, optionally, their labels. Made by `create_npz`."""

    def __init__(self, member: IO[bytes], count: int):
        self.count = count
        self.written = 0
        self.labels: list[np.ndarray] = []
        self._member = member
        self._like: tuple[tuple[int, ...], np.dtype] | None = None

    def append(self, batch: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Add rows.

        Args:
            batch: [n, ...], all batches of one dtype and row shape; images: uint8 [n, H, W, 3].
            labels: integers [n], with every batch or with none.

        Raises:
            ValueError: a batch unlike the first one.
        """
        like = (batch.shape[1:], batch.dtype)
        if self._like is None:
            self._like = like
            header = {
                "descr": npy_format.dtype_to_descr(batch.dtype),
                "fortran_order": False,
                "shape": (self.count, *batch.shape[1:]),
            }
            npy_format.write_array_header_1_0(self._member, header)
        if like != self._like:
            raise ValueError(f"rows of {like} after rows of {self._like}")
        if (labels is not None) != bool(self.labels) and self.written:
            raise ValueError("labels must come with every batch or with none")
        if labels is not None:
            self.labels.append(labels.astype(np.int64))
        self._member.write(np.ascontiguousarray(batch).tobytes())
        self.written += len(batch)


@contextmanager
def create_npz(path: str | os.PathLike, count: int, provenance: str = "") -> Iterator[NpzWriter]:
    """Give a writer whose batches go straight into the uncompressed `arr_0` of a new archive.

    Labels become `arr_1`, int64 [count]. The file appears under its name only when the block ends without
    an error; being uncompressed it can be memory-mapped (`image_datasets`).

    Args:
        path: the archive.
        count: how many rows will be written.
        provenance: a text that says where the rows come from, kept as `provenance`, a string of numpy's.

    Raises:
        ValueError: another number of rows was written.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            writer = NpzWriter(member, count)
            yield writer
        if writer.written != count or sum(map(len, writer.labels)) not in (0, count):
            raise ValueError(f"{writer.written} of {count} rows were written to {path}")
        if writer.labels:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                npy_format.write_array(member, np.concatenate(writer.labels), allow_pickle=False)
        if provenance:
            with archive.open(zipfile.ZipInfo("provenance.npy"), "w") as member:
                npy_format.write_array(member, np.array(provenance), allow_pickle=False)
