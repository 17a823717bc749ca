"""What the reference builders share: images from wherever they lie, in a fixed order, into one npz.

Nothing is held but one block, so the 1.28 million images of ImageNet-32 need no more memory than ten.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.image_sets import BLOCK, ImageSet, write_npz
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.remote import local_path


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
    from guided_diffusion.image_datasets import FolderDataset

    if not root.is_dir():
        raise UserError(f"no such folder: {root}")
    try:
        folder = FolderDataset(root, size, class_cond=True)
    except UserError:  # its names tell no classes; what else is wrong is told now
        folder = FolderDataset(root, size, class_cond=False)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for start in range(0, len(folder), BLOCK):
            images, labels = folder.batch(np.arange(start, min(start + BLOCK, len(folder))))
            yield images, labels if folder.num_classes > 1 else None

    return ImageSet(len(folder), blocks())


def build(description: str | None, default_out: str, open_images: Callable[[Path], ImageSet]) -> None:
    """A builder's command line: `--in`, `--out`; write what `open_images` finds.

    Raises:
        UserError: as `open_images`.
    """
    parser = make_bare_parser(description)
    parser.add_argument(
        "--in", dest="source", type=Path, required=True, help="where the images lie (see above)"
    )
    parser.add_argument(
        "--out", type=local_path, default=Path(default_out), help=f"npz to write (default {default_out})"
    )
    args = parser.parse_args()
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, such as {args.out / default_out}")
    _require_replaceable(args.out)
    images = open_images(args.source)
    classes = write_npz(images, args.out)
    print(f"wrote {args.out}: {images.count} images, {f'{classes} classes' if classes else 'no labels'}")


def _require_replaceable(path: Path) -> None:
    """Refuse to write over what is no archive of images, such as a file that is read.

    Raises:
        UserError: it is something else.
    """
    if path.is_file() and path.stat().st_size:
        try:
            NpzFile(path).require("arr_0")
        except UserError:
            raise UserError(
                f"--out {path}: is no archive of images, and would be replaced; name another file"
            ) from None
