"""Where the batches of a training loop come from."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import torch as th

from .. import dist_util
from .objective import ImageBatch


class Source(Protocol):
    """Where the batches of this rank come from.

    Attributes:
        has_state: whether there is something to save beside the number of the step.
    """

    has_state: bool

    def next_batch(self, step: int) -> Any:
        """The batch of the iteration after `step` others, on the device."""
        ...

    def writer(self) -> Callable[[Path], None] | None:
        """Collective: a function that writes the source's state on rank 0, or None if it has none."""
        ...

    def pool_record(self) -> dict[str, Any] | None:
        """Collective: what `pool.jsonl` says of the source at a save, or None if it has no pool."""
        ...

    def close(self) -> None:
        """End what runs beside the loop."""
        ...


class ImageSource:
    """Batches of images; what is drawn at a step is a function of the step, so there is no state to keep.

    Args:
        batches: images uint8 [B, H, W, 3], or whatever else `encode` takes, and labels int64 [B].
        encode: makes samples x_0 of them, on the device.
        labelled: whether the network takes the labels.
    """

    has_state = False

    def __init__(
        self,
        batches: Generator[tuple[th.Tensor, th.Tensor], None, None],
        encode: Callable[[th.Tensor], th.Tensor],
        labelled: bool,
    ):
        self.batches, self.encode, self.labelled = batches, encode, labelled

    def next_batch(self, step: int) -> ImageBatch:
        """The next images as samples, on the device."""
        images, labels = next(self.batches)
        device = dist_util.dev()
        x_start = self.encode(images.to(device))
        return ImageBatch(x_start, labels.to(device) if self.labelled else None)

    def writer(self) -> None:
        """Nothing to write."""
        return None

    def pool_record(self) -> None:
        """There is no pool."""
        return None

    def close(self) -> None:
        """End the processes that load images: they leave signals to this one, which would wait for them."""
        self.batches.close()
