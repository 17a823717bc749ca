#!/usr/bin/env python
"""Write CelebA-64's reference for scoring.

    python evaluations/celeba64_npz.py --in FOLDER --out celeba64_train.npz

FOLDER holds the aligned and cropped faces (img_align_celeba, 178x218). They are scaled and cropped to
64x64 by the very function that training uses, so that reference and training set hold the same pixels.
"""

from pathlib import Path

from evaluations.npz import build, folder_images
from guided_diffusion.io.image_sets import ImageSet
from guided_diffusion.processes.launch import run_script


def open_images(source: Path) -> ImageSet:
    """The images of a folder."""
    return folder_images(source, 64)


def main() -> None:
    """Parse, read, write."""
    build(__doc__, "celeba64_train.npz", open_images)


if __name__ == "__main__":
    run_script(main)
