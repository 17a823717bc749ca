#!/usr/bin/env python
"""Mix real and synthetic images: the training sets of the data-limited and data-based baselines.

    python datasets/mix.py --real R.npz --synthetic S.npz --ratio 0.05 --seed 0 --out MIXED.npz

The mixed set has as many images as R. round(RATIO x that number) of them are drawn from R at random
without replacement, the rest likewise from S: ratio 0 is data-free, 0.05 to 0.2 data-limited, 1
data-based training. Real images come first, each part in the order of its file. One seed draws nested
sets: the real images of ratio 0.05 are among those of ratio 0.1. Labels (arr_1) are kept if every file
that gives images has them. A folder of PNGs is named CLASS_NUMBER.png then; what reads it numbers the
classes that occur.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.image_folder import write_image_folder
from guided_diffusion.io.image_sets import ImageFile, ImageSet, open_images, write_npz
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script

BLOCK = 1024  # images


@dataclass(frozen=True)
class Part:
    """What one file gives.

    Attributes:
        file: the images.
        chosen: int64 [n], ascending numbers of those that are taken.
        labels: int64 [n] of those, or None.
    """

    file: ImageFile
    chosen: np.ndarray
    labels: np.ndarray | None

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Images uint8 [m, H, W, 3] and labels int64 [m] or None, m at most `BLOCK`."""
        start = 0
        for block in self.file.batches(BLOCK):
            first, last = np.searchsorted(self.chosen, [start, start + len(block)])
            if first < last:
                images = block[self.chosen[first:last] - start]
                yield images, None if self.labels is None else self.labels[first:last]
            start += len(block)


def choose(total: int, count: int, seed: list[int]) -> np.ndarray:
    """Ascending numbers int64 [count] of `total` things; for one seed, smaller counts are subsets."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def plan(real_path: Path, synthetic_path: Path | None, ratio: float, seed: int) -> list[Part]:
    """Decide what each file gives, reading headers and labels only.

    Args:
        real_path: npz with `arr_0` uint8 [N, H, W, 3] and, for labels, integers [N] in `arr_1`.
        synthetic_path: likewise; None if the ratio is 1.
        ratio: share of real images, in [0, 1].
        seed: not negative.

    Returns:
        The parts that give at least one image, N in all.

    Raises:
        UserError: any of this is not so, images of different sizes, or too few synthetic ones.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"--ratio {ratio:g}: must lie between 0 (all synthetic) and 1 (all real)")
    if seed < 0:
        raise UserError(f"--seed {seed}: must not be negative")
    real = open_images(NpzFile(real_path), at_least=1)
    real_count = round(ratio * real.count)
    sources = [(real, choose(real.count, real_count, [seed, 0]))]
    if missing := real.count - real_count:
        if synthetic_path is None:
            raise UserError(f"--synthetic is needed: {missing} of {real.count} images are to be synthetic")
        synthetic = open_images(NpzFile(synthetic_path), at_least=1)
        if (synthetic.height, synthetic.width) != (real.height, real.width):
            sizes = f"{synthetic.height}x{synthetic.width}, those of {real_path} {real.height}x{real.width}"
            raise UserError(f"{synthetic_path}: its images are {sizes}")
        if synthetic.count < missing:
            raise UserError(f"{synthetic_path}: holds {synthetic.count} images, {missing} are needed")
        sources.append((synthetic, choose(synthetic.count, missing, [seed, 1])))
    sources = [(file, chosen) for file, chosen in sources if len(chosen)]
    labelled = all("arr_1" in file.npz.headers for file, _ in sources)
    return [Part(file, chosen, read_labels(file)[chosen] if labelled else None) for file, chosen in sources]


def read_labels(file: ImageFile) -> np.ndarray:
    """The labels of all images, int64 [N].

    Raises:
        UserError: `arr_1` is not one integer per image, 0 or above.
    """
    labels = file.npz.load("arr_1")
    if labels.shape != (file.count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(f"{file.path}: arr_1 must hold {file.count} integers from 0, one label per image")
    return labels.astype(np.int64)


def main() -> None:
    """Parse, choose, write."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--real", type=Path, required=True, help="npz of the real images")
    parser.add_argument("--synthetic", type=Path, help="npz of the synthetic images; not needed for ratio 1")
    parser.add_argument("--ratio", type=float, required=True, help="share of real images, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (default 0)")
    parser.add_argument(
        "--out", type=local_path, required=True, help="npz to write, or a new folder for PNGs"
    )
    args = parser.parse_args()

    if any(path and path.resolve() == args.out.resolve() for path in (args.real, args.synthetic)):
        raise UserError(f"--out {args.out}: is one of the files to be mixed")
    parts = plan(args.real, args.synthetic, args.ratio, args.seed)
    images = ImageSet(sum(len(part.chosen) for part in parts), (b for part in parts for b in part.blocks()))
    if args.out.suffix == ".npz":
        write_npz(images, args.out)
    else:
        # Of equal width, so that the names sort as the labels do.
        largest = max((int(part.labels.max()) for part in parts if part.labels is not None), default=0)
        digits = len(str(largest))
        write_image_folder(args.out, images.count, images.blocks, lambda label: f"{label:0{digits}}")
    counts = " + ".join(f"{len(part.chosen)} of {part.file.path}" for part in parts)
    print(f"wrote {args.out}: {counts}, {'no labels' if parts[0].labels is None else 'with labels'}")


if __name__ == "__main__":
    run_script(main)
