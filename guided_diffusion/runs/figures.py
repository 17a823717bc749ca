"""Pictures a person can judge: grids of samples and curves of a run."""

import os
from pathlib import Path

import numpy as np

from ..io.files import atomic_path
from ..logger import read_progress


def save_grid(path: str | os.PathLike, images: np.ndarray, columns: int = 8, scale: int = 1) -> None:
    """Write uint8 [N, H, W, 3] as one PNG, row by row, with a thin gap, each pixel `scale` wide."""
    from PIL import Image

    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = 2
    grid = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, 3), 32, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + i // columns * (height * scale + gap)
        left = gap + i % columns * (width * scale + gap)
        grid[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(
            scale, 1
        )
    with atomic_path(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def save_comparison(path: str | os.PathLike, panels: dict[str, np.ndarray]) -> None:
    """Write titled grids, ten in a row, of uint8 [N, H, W, 3] side by side as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 4.8), layout="constrained")
    for axes, (title, images) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        columns, rows = 10, len(images) // 10
        images = np.pad(images[: rows * columns], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=96)
        height, width = images.shape[1:3]
        tiles = images.reshape(rows, columns, height, width, 3)
        axes.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
        axes.set_title(title, fontsize=11)
        axes.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_curves(path: str | os.PathLike, progress: Path, title: str) -> None:
    """Draw the losses of a progress.csv over its iterations, on a logarithmic scale, if there are any."""
    from matplotlib.figure import Figure

    rows = read_progress(progress)
    losses = ("mse", "vb", "align", "bottleneck")
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name.endswith(losses)]
    points = {name: [(row["step"], row[name]) for row in rows if row.get(name, 0) > 0] for name in names}
    if not any(points.values()):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, pairs in points.items():
        if pairs:
            axes.plot(*zip(*pairs, strict=True), label=name.replace("_", " "), linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.set_title(title, parse_math=False)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    axes.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
