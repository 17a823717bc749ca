"""The contract of a sample space."""

from typing import Any, Protocol

import numpy as np
import torch as th


class SampleSpace(Protocol):
    """What the samples x of a diffusion process are.

    Attributes:
        shape: (C, H, W) of one sample.
        image_size: H' = W' of the image that it decodes to.
        bounds: where the predicted x_0 is clipped if the process clips it, or None where it never is.
    """

    shape: tuple[int, int, int]
    image_size: int
    bounds: tuple[float, float] | None

    def encode(self, images: th.Tensor) -> th.Tensor:
        """Images uint8 [B, H', W', 3] -> samples float32 [B, C, H, W] on the same device."""
        ...

    def decode(self, x: th.Tensor) -> np.ndarray:
        """Samples [B, C, H, W] -> images uint8 [B, H', W', 3] on the CPU."""
        ...

    def identity(self) -> dict[str, Any]:
        """What tells its samples from another space's of the same shape, in JSON's types; {} for pixels."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of the space its network was trained in, in JSON's types."""
        ...
