"""What the reference builders share: images from wherever they lie, in a fixed order, into one npz.

Nothing is held but one block, so the 1.28 million images of ImageNet-32 need no more memory than ten.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.io.npz_writer import create_npz
from guided_diffusion.io.progress import progress_bar
from guided_diffusion.io.remote import local_path

from .official_batches import imagenet32_files, open_imagenet32, read_cifar10

BLOCK = 512  # images


@dataclass(frozen=True)
class ImageSet:
    """Images that can be gone through once.

    Attributes:
        count: N.
        blocks: images uint8 [n, H, W, 3], RGB, with labels int64 [n], or None in every block.
    """

    count: int
    blocks: Iterator[tuple[np.ndarray, np.ndarray | None]]


def folder_images(root: Path, size: int) -> ImageSet:
    """A folder tree of image files in sorted order, preprocessed exactly as for training.

    Labels are as in training on that folder (`image_datasets.open_dataset`), if its names tell at
    least two classes; otherwise there are none.

    Args:
        root: the folder.
        size: height and width that images are brought to (`image_datasets.center_crop`).

    Raises:
        UserError: no such folder, no images in it, or (while going through) an unreadable one.
    """
    from guided_diffusion.image_datasets import class_names, list_images, read_image

    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    paths = list_images(root)
    told = len({path.parent for path in paths}) > 1 or all("_" in path.name for path in paths)
    names = class_names(paths) if told else []
    numbers = {name: i for i, name in enumerate(sorted(set(names)))}
    labels = np.array([numbers[name] for name in names], np.int64) if len(numbers) > 1 else None

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for start in range(0, len(paths), BLOCK):
            here = slice(start, start + BLOCK)
            images = np.stack([read_image(path, size) for path in paths[here]])
            yield images, None if labels is None else labels[here]

    return ImageSet(len(paths), blocks())


def cifar10_images(archive: Path, split: str) -> ImageSet:
    """The images of the official archive, "train" or "test", in its order, with labels.

    Raises:
        UserError: missing or damaged archive.
    """
    batches = read_cifar10(archive, split)
    blocks = (block for batch in batches for block in batch.blocks(BLOCK))
    return ImageSet(sum(len(batch.labels) for batch in batches), blocks)


def imagenet32_images(folder: Path) -> ImageSet:
    """ImageNet-32 from its ten official batches, in their order, or from a folder tree of images.

    Raises:
        UserError: neither is there, or damaged.
    """
    files = imagenet32_files(folder) if folder.is_dir() else []
    if not files:
        return folder_images(folder, 32)
    count = sum(len(open_imagenet32(path).labels) for path in files)  # reads, and checks, all of them

    return ImageSet(count, (block for path in files for block in open_imagenet32(path).blocks(BLOCK)))


def build(description: str | None, default_out: str, open_images: Callable[[Path], ImageSet]) -> None:
    """A builder's command line: `--in`, `--out`; write what `open_images` finds.

    Raises:
        UserError: as `open_images`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--in", dest="source", type=Path, required=True, help="where the images lie (see above)"
    )
    parser.add_argument(
        "--out", type=local_path, default=Path(default_out), help=f"npz to write (default {default_out})"
    )
    args = parser.parse_args()
    images = open_images(args.source)
    classes = write_npz(images, args.out)
    print(f"wrote {args.out}: {images.count} images, {f'{classes} classes' if classes else 'no labels'}")


def write_npz(images: ImageSet, out: Path) -> int:
    """Write images to `arr_0` and labels, if there are any, to `arr_1`; whole or not at all.

    Returns:
        The number of classes; 0 without labels.
    """
    seen: set[int] = set()
    with create_npz(out, images.count) as writer, progress_bar(images.count, out.name) as bar:
        for block, labels in images.blocks:
            writer.append(block, labels)
            seen.update([] if labels is None else labels.tolist())
            bar.update(len(block))
    return len(seen)
