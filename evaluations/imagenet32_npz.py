#!/usr/bin/env python
"""Write ImageNet-32's reference for scoring.

    python evaluations/imagenet32_npz.py --in FOLDER --out FILE.npz

FOLDER holds the official batches of the downsampled ImageNet, train_data_batch_1 to _10 (pickles or
npz files), or a tree of images. Classes count from 0.
"""

from pathlib import Path

from evaluations.npz import build, folder_images
from guided_diffusion.io.image_sets import ImageSet
from guided_diffusion.io.official_batches import imagenet32_images
from guided_diffusion.processes.launch import run_script


def open_images(source: Path) -> ImageSet:
    """The images of the batches or, where there are none, of a folder tree."""
    return (imagenet32_images(source) if source.is_dir() else None) or folder_images(source, 32)


def main() -> None:
    """Parse, read, write."""
    build(__doc__, "ImageNet32_train_all.npz", open_images)


if __name__ == "__main__":
    run_script(main)
