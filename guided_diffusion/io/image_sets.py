"""Images by the thousand, a block at a time: npz files checked before they are read, sets to be written."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from .npz_reader import NpzFile
from .npz_writer import create_npz
from .progress import Progress

BLOCK = 512  # images


class Images(Protocol):
    """Images that can be gone through again and again."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def path(self) -> Path:
        """Where they lie, or what else messages call them."""

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 [at most `size`, H, W, 3]."""


@dataclass(frozen=True)
class ImageArray:
    """Images uint8 [N, H, W, 3] in memory; `path` is what messages call them."""

    images: np.ndarray
    path: Path

    @property
    def count(self) -> int:
        """N."""
        return len(self.images)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 [at most `size`, H, W, 3]."""
        return (self.images[start : start + size] for start in range(0, self.count, size))


@dataclass(frozen=True)
class ImageFile:
    """An npz whose `arr_0` is uint8 [N, H, W, 3]; reads in blocks, so its size does not matter."""

    npz: NpzFile
    count: int
    height: int
    width: int

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.npz.path

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 [at most `size`, H, W, 3]."""
        return self.npz.stream("arr_0", size)


def open_images(npz: NpzFile, *, at_least: int, sizes: Collection[int] = ()) -> ImageFile:
    """Check that an archive holds enough images; its headers alone are read.

    Args:
        npz: the archive.
        at_least: the number of images below which a score is undefined.
        sizes: heights and widths that the images, then square, may have; none for any.

    Raises:
        UserError: no `arr_0`, not uint8, not [N, H, W, 3], too few images or of another size.
    """
    shape, dtype = npz.require("arr_0")
    if len(shape) != 4 or shape[3] != 3:
        hint = "; this looks like NCHW, transpose it" if len(shape) == 4 and shape[1] == 3 else ""
        raise UserError(f"{npz.path}: arr_0 has shape {list(shape)}, images are [N, height, width, 3]{hint}")
    if min(shape[1:3]) < 1:
        raise UserError(f"{npz.path}: arr_0 has shape {list(shape)}, its images have no pixels")
    if dtype != np.uint8:
        raise UserError(f"{npz.path}: arr_0 is {dtype}{_range_hint(npz, dtype)}, images are uint8 0..255")
    if shape[0] < at_least:
        raise UserError(f"{npz.path}: holds {shape[0]} images, at least {at_least} are needed")
    if sizes and (shape[1] != shape[2] or shape[1] not in sizes):
        wanted = " or ".join(f"{size}x{size}" for size in sizes)
        raise UserError(f"{npz.path}: images of {shape[1]}x{shape[2]}, {wanted} are wanted here")
    return ImageFile(npz, *shape[:3])


def _range_hint(npz: NpzFile, dtype: np.dtype) -> str:
    """What values an array of the wrong dtype begins with, so that the user sees what it holds."""
    first = next(npz.stream("arr_0", 16), np.empty(0))
    if dtype.kind not in "iuf" or first.size == 0:
        return ""
    if not np.isfinite(first).all():
        return " and holds NaN or infinity"
    return f" with values from {first.min():g} to {first.max():g}"


@dataclass(frozen=True)
class ImageSet:
    """Images that can be gone through once.

    Attributes:
        count: N.
        blocks: images uint8 [n, H, W, 3], RGB, with labels int64 [n], or None in every block.
    """

    count: int
    blocks: Iterator[tuple[np.ndarray, np.ndarray | None]]


def write_npz(images: ImageSet, out: Path) -> int:
    """Write images to `arr_0` and labels, if there are any, to `arr_1`; whole or not at all.

    Returns:
        The number of classes; 0 without labels.
    """
    seen: set[int] = set()
    with create_npz(out, images.count) as writer, Progress(images.count, out.name, "images") as progress:
        for block, labels in images.blocks:
            writer.append(block, labels)
            seen.update([] if labels is None else labels.tolist())
            progress.advance(len(block))
    return len(seen)
