"""Pictures a person can judge: grids of samples and curves of a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..io.files import atomic_path
from ..logger import read_progress


def save_grid(path: str | os.PathLike, images: np.ndarray, columns: int = 8, scale: int = 1) -> None:
    """Write uint8 [N, H, W, 3] as one PNG, row by row, with a thin gap, each pixel `scale` wide."""
    from PIL import Image

    grid = _tiled(images.repeat(scale, 1).repeat(scale, 2), min(columns, len(images)), shade=32)
    with atomic_path(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")


def _tiled(images: np.ndarray, columns: int, shade: int) -> np.ndarray:
    """uint8 [N, H, W, 3] row by row as one picture, with gaps of 2 pixels of a shade of grey around each."""
    rows, gap = -(-len(images) // columns), 2
    missing = rows * columns - len(images)
    images = np.pad(images, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=shade)
    height, width = images.shape[1:3]
    tiles = images.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    whole = tiles.reshape(rows * height, columns * width, 3)
    return np.pad(whole, ((gap, 0), (gap, 0), (0, 0)), constant_values=shade)


def save_figure(path: str | os.PathLike, figure: Any, dpi: int) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def save_comparison(path: str | os.PathLike, panels: dict[str, np.ndarray]) -> None:
    """Write titled grids, ten in a row, of uint8 [N, H, W, 3] side by side as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 4.8), layout="constrained")
    for axes, (title, images) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axes.imshow(_tiled(images, 10, shade=96))
        axes.set_title(title, fontsize=11)
        axes.axis("off")
    save_figure(path, figure, dpi=110)


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
    save_figure(path, figure, dpi=110)
