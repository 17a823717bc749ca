"""The official Python batches of CIFAR-10 and ImageNet-32, read without running anything in them.

A batch is a pickled dict: `data` uint8 [N, 3072], each row an image's red, green and blue plane, and
`labels`, N integers. CIFAR-10 (A. Krizhevsky, 2009) comes as one archive of batches whose classes count
from 0; ImageNet-32 (P. Chrabaszcz et al., 2017) as ten files, pickles or npz, whose classes count from 1.
"""

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from .image_sets import BLOCK, ImageSet
from .npz_reader import NpzFile
from .safe_pickle import load_arrays

SIZE = 32
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_IMAGENET_CLASSES = range(1, 1001)
_IMAGENET_FILE = re.compile(r"train_data_batch_([1-9]|10)(\.npz)?")
_IMAGENET_FILES = 10
_DAMAGE = (tarfile.TarError, zlib.error, lzma.LZMAError)
_MAX_BATCH_BYTES = 1 << 28  # CIFAR-10's have 31 MB; an archive's claims are not believed beyond this


def cifar10_images(archive: Path, split: str) -> ImageSet:
    """The images of a split, with labels, from `cifar-10-python.tar.gz`, in its order.

    Args:
        archive: the official archive, as it is downloaded.
        split: "train" (50,000 images) or "test" (10,000).

    Raises:
        UserError: missing or damaged archive, or one that lacks a batch.
    """
    if not archive.is_file():
        raise UserError(f"no such file: {archive}")
    batches: dict[str, ImageSet] = {}
    try:
        with tarfile.open(archive) as tar:
            unpacked: Any = tar.fileobj
            for member in tar:
                file = PurePosixPath(member.name).name
                if member.isfile() and file in CIFAR10_FILES[split]:
                    batches[file] = _read_member(tar, member, f"{archive}: {member.name}")
            while unpacked.read(1 << 20):
                pass  # gzip's checksum of all of it stands at the end
    except (*_DAMAGE, EOFError, OSError, ValueError, OverflowError, MemoryError) as error:
        told = f"damaged, or not the official CIFAR-10 archive ({first_line(error)})"
        raise UserError(f"{archive}: {told}") from None
    missing = [file for file in CIFAR10_FILES[split] if file not in batches]
    if missing:
        raise UserError(f"{archive}: is not the official CIFAR-10 archive, it has no {', '.join(missing)}")
    ordered = [batches[file] for file in CIFAR10_FILES[split]]
    return ImageSet(sum(batch.count for batch in ordered), chain(*(batch.blocks for batch in ordered)))


def imagenet32_images(folder: Path) -> ImageSet | None:
    """The images of the ten files train_data_batch_1 to _10, each with or without `.npz`, with labels.

    All files are read, and checked, before the first image is given out. A pickle is read whole
    (400 MB), of an npz the labels and a block at a time.

    Returns:
        None if there is not one such file.

    Raises:
        UserError: some are missing, one is there twice, or damaged.
    """
    files = _imagenet32_files(folder)
    count = sum(_open_imagenet32(path).count for path in files)
    return ImageSet(count, (b for path in files for b in _open_imagenet32(path).blocks)) if files else None


def _imagenet32_files(folder: Path) -> list[Path]:
    numbered: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _IMAGENET_FILE.fullmatch(path.name):
            if int(match[1]) in numbered:
                raise UserError(f"{folder}: holds {numbered[int(match[1])].name} and {path.name}; keep one")
            numbered[int(match[1])] = path
    wanted = range(1, _IMAGENET_FILES + 1)
    missing = [f"train_data_batch_{i}" for i in wanted if i not in numbered]
    if numbered and missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)} of the {_IMAGENET_FILES} batches")
    return [numbered[i] for i in wanted if numbered]


def _open_imagenet32(path: Path) -> ImageSet:
    if path.suffix != ".npz":
        return _batch(load_arrays(path), str(path), _IMAGENET_CLASSES)
    archive = NpzFile(path)
    shape, dtype = archive.require("data")
    _check_rows(shape, dtype, str(path))
    labels = _checked_labels(archive.load("labels"), shape[0], str(path), _IMAGENET_CLASSES)
    return _images(archive.stream("data", BLOCK), labels)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> ImageSet:
    if member.size > _MAX_BATCH_BYTES:
        raise UserError(f"{name}: claims to be of {member.size} bytes, no CIFAR-10 batch is")
    stream: Any = tar.extractfile(member)
    return _batch(load_arrays(stream, name), name, range(len(CIFAR10_CLASSES)))


def _batch(content: Any, name: str, classes: range) -> ImageSet:
    if not isinstance(content, dict) or not {"data", "labels"} <= set(content):
        raise UserError(f"{name}: is no batch of images, it has no 'data' and 'labels'")
    data = content["data"]
    if not isinstance(data, np.ndarray):
        raise UserError(f"{name}: 'data' is a {type(data).__name__}, no array")
    _check_rows(data.shape, data.dtype, name)
    labels = _checked_labels(content["labels"], len(data), name, classes)
    return _images((data[i : i + BLOCK] for i in range(0, len(data), BLOCK)), labels)


def _images(rows: Iterator[np.ndarray], labels: np.ndarray) -> ImageSet:
    """Blocks of rows uint8 [n, 3072] with all their labels, as images."""

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for block in rows:
            images = block.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
            yield images, labels[start : start + len(block)]
            start += len(block)

    return ImageSet(len(labels), blocks())


def _check_rows(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    row = 3 * SIZE * SIZE
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != row:
        raise UserError(f"{name}: 'data' is {dtype} {list(shape)}, it should be uint8 [N, {row}]")


def _checked_labels(labels: Any, count: int, name: str, classes: range) -> np.ndarray:
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(values, list) or len(values) != count:
        raise UserError(f"{name}: 'labels' is no list of {count} labels, one per image")
    if not all(isinstance(value, (int, np.integer)) and value in classes for value in values):
        raise UserError(f"{name}: 'labels' holds something outside {classes[0]} to {classes[-1]}")
    return np.array(values, np.int64) - classes[0]
