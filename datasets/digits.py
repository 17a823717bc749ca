#!/usr/bin/env python
"""Write scikit-learn's handwritten digits as an npz, the demo's real images.

    python datasets/digits.py [--out FOLDER] [--size 16|32]

digits.npz holds `arr_0`, uint8 [1797, 16, 16, 3], and `arr_1`, int64 labels [1797]; digits-32.npz the same
enlarged to 32x32. The same bytes on every machine; nothing is downloaded.
"""

from pathlib import Path

import numpy as np

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import SIZES, digits_file, load_digit_images
from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, convert, write."""
    parser = make_bare_parser(__doc__)
    parser.add_argument(
        "--out", type=local_path, default=Path("datasets/digits"), help="folder (default datasets/digits)"
    )
    parser.add_argument("--size", type=int, choices=SIZES, default=SIZES[0], help="in pixels (default 16)")
    args = parser.parse_args()
    if args.out.suffix == ".npz":
        raise UserError(f"--out: names a folder, not a file such as {args.out}")
    images, labels = load_digit_images(args.size)
    path = args.out / digits_file(args.size)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images, labels)
    print(f"wrote {path}: {len(images)} images of {images.shape[1]}x{images.shape[2]}")


if __name__ == "__main__":
    run_script(main)
