#!/usr/bin/env python
"""Write ImageNet-32's reference: `python evaluations/imagenet32_npz.py --in FOLDER --out FILE.npz`.

FOLDER holds the official batches of the downsampled ImageNet, train_data_batch_1 to _10 (pickles or
npz files), or a tree of images. Classes count from 0.
"""

from evaluations.npz import build, imagenet32_images
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, read, write."""
    build(__doc__, "ImageNet32_train_all.npz", imagenet32_images)


if __name__ == "__main__":
    run_script(main)
