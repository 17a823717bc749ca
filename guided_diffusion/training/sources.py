"""Where the batches of a training loop come from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch as th

from .. import dist_util
from ..distill.dynamic_batch import DistillationBatch, DynamicBatch
from ..distill.objectives import ImageBatch
from ..distill.pool_file import write_pool
from ..gaussian_diffusion import GaussianDiffusion, Model
from ..runs.checkpoint_writer import to_cpu


class Source(Protocol):
    """Where the batches of this rank come from.

    Attributes:
        has_state: whether there is something to save beside the number of the step.
    """

    has_state: bool

    def next_batch(self) -> Any:
        """The next iteration's batch, on the device."""
        ...

    def writer(self) -> Callable[[Path], None] | None:
        """Collective: a function that writes the source's state on rank 0, or None if it has none."""
        ...


class TeacherSource:
    """Batches from the dynamic batch, which the teacher advances as it makes the targets."""

    has_state = True

    def __init__(
        self, pool: DynamicBatch, teacher: Model, diffusion: GaussianDiffusion, batch_size: int, prob: float
    ):
        self.pool, self.teacher, self.diffusion = pool, teacher, diffusion
        self.batch_size, self.prob = batch_size, prob

    def next_batch(self) -> DistillationBatch:
        """One teacher step."""
        return self.pool.next_batch(self.batch_size, self.teacher, self.diffusion, self.prob)

    def writer(self) -> Callable[[Path], None]:
        """The pools of all ranks, one after the other."""
        pool = self.pool
        x, levels = dist_util.all_gather(pool.x), dist_util.all_gather(pool.levels)
        y = None if pool.y is None else dist_util.all_gather(pool.y)
        x, levels, y = to_cpu([x, levels, y])  # copies: training goes on while they are written
        whole = DynamicBatch(x, levels, pool.num_timesteps, y)
        return lambda path: write_pool(path, [whole], {"T": pool.num_timesteps})


class ImageSource:
    """Batches of images from an iterator of (float32 [B, 3, H, W], int64 [B]); what is drawn at a
    step is a function of the step, so there is no state to keep.
    """

    has_state = False

    def __init__(self, batches: Iterator[tuple[th.Tensor, th.Tensor]], labelled: bool):
        self.batches, self.labelled = batches, labelled

    def next_batch(self) -> ImageBatch:
        """The next images, on the device."""
        images, labels = next(self.batches)
        device = dist_util.dev()
        return ImageBatch(images.to(device), labels.to(device) if self.labelled else None)

    def writer(self) -> None:
        """Nothing to write."""
        return None
