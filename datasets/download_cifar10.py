#!/usr/bin/env python
"""Write CIFAR-10 as two folders of PNGs.

    python datasets/download_cifar10.py --out datasets

Makes cifar_train (50,000 images) and cifar_test (10,000), named CLASS_NUMBER.png as training and
evaluations/cifar_npz.py read them; NUMBER is the place in the official order, from 0. The official
archive is downloaded by torchvision unless --archive gives it.
"""

import http.client
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.image_folder import require_absent, write_image_folder
from guided_diffusion.io.official_batches import CIFAR10_CLASSES, CIFAR10_FILES, cifar10_images
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


@contextmanager
def downloaded(folder: Path) -> Iterator[Path]:
    """Download the archive, checked by its checksum, into a temporary folder within `folder`.

    Raises:
        UserError: torchvision cannot be imported, or the download fails.
    """
    instead = "or download cifar-10-python.tar.gz yourself and pass it with --archive"
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError, OSError) as error:  # its compiled part may not fit torch's
        raise UserError(f"torchvision cannot be imported ({error}): install it, {instead}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        try:
            CIFAR10(temporary, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"CIFAR-10 could not be downloaded ({error}): try again, {instead}") from None
        yield Path(temporary) / CIFAR10.filename


def write_splits(archive: Path, out: Path) -> None:
    """Write both splits of the official archive below `out`."""
    for split in CIFAR10_FILES:
        folder = out / f"cifar_{split}"
        images = cifar10_images(archive, split)
        write_image_folder(folder, images.count, images.blocks, CIFAR10_CLASSES.__getitem__)
        print(f"wrote {folder}: {images.count} images")


def main() -> None:
    """Parse, download, convert."""
    parser = make_bare_parser(__doc__)
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("datasets"),
        help="of cifar_train and cifar_test (default datasets)",
    )
    parser.add_argument("--archive", type=Path, help="the official cifar-10-python.tar.gz")
    args = parser.parse_args()
    for split in CIFAR10_FILES:
        require_absent(args.out / f"cifar_{split}")
    if args.archive:
        write_splits(args.archive, args.out)
    else:
        with downloaded(args.out) as archive:
            write_splits(archive, args.out)


if __name__ == "__main__":
    run_script(main)
