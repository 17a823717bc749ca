#!/usr/bin/env python
"""Write CIFAR-10's reference for scoring.

    python evaluations/cifar_npz.py --in SOURCE --out cifar10_train.npz

SOURCE is the official cifar-10-python.tar.gz, of which the 50,000 training images are taken, or a
folder of images such as the cifar_train that datasets/download_cifar10.py writes. Both give the
same images and labels, each in its own order.
"""

from pathlib import Path

from evaluations.npz import build, folder_images
from guided_diffusion.io.image_sets import ImageSet
from guided_diffusion.io.official_batches import cifar10_images
from guided_diffusion.processes.launch import run_script


def open_images(source: Path) -> ImageSet:
    """The images of an archive or a folder."""
    return cifar10_images(source, "train") if source.is_file() else folder_images(source, 32)


def main() -> None:
    """Parse, read, write."""
    build(__doc__, "cifar10_train.npz", open_images)


if __name__ == "__main__":
    run_script(main)
