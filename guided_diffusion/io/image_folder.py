"""Write a folder of PNGs in the form that `image_datasets` reads, whole or not at all."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..errors import UserError
from .files import temporary_path
from .progress import Progress


def require_absent(folder: Path) -> None:
    """Refuse to write over a folder that is there.

    Raises:
        UserError: something of that name is there.
    """
    if folder.exists():
        raise UserError(f"{folder}: is there already; remove it to make it anew, or choose another name")


def write_image_folder(
    folder: Path,
    count: int,
    blocks: Iterable[tuple[np.ndarray, np.ndarray | None]],
    class_name: Callable[[int], str],
) -> None:
    """Write images as CLASS_NUMBER.png, or NUMBER.png without labels; NUMBER is the place, from 0.

    The folder appears under its name only with all its images.

    Args:
        folder: what to make.
        count: how many images there are; makes all numbers equally wide.
        blocks: images uint8 [n, H, W, 3] with labels int64 [n], or None in every block.
        class_name: the name of a label, without "_"; names must sort as labels do, because that is
            how they are numbered when the folder is read.

    Raises:
        UserError: the folder is there already.
    """
    from PIL import Image

    require_absent(folder)
    digits = max(5, len(str(count - 1)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder)
    temporary.mkdir()
    number = 0
    try:
        with Progress(count, folder.name, "images") as progress:
            for images, labels in blocks:
                for i, image in enumerate(images):
                    prefix = "" if labels is None else f"{class_name(int(labels[i]))}_"
                    Image.fromarray(image).save(temporary / f"{prefix}{number:0{digits}}.png")
                    number += 1
                progress.advance(len(images))
        temporary.rename(folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
