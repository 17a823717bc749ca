"""The contract of a sample space."""

from typing import Any, Protocol

import numpy as np
import torch as th


class SampleSpace(Protocol):
    """What the samples x of a diffusion process are.

    Attributes:
        shape: (C, H, W) of one sample.
        bounds: where the predicted x_0 is clipped, or None where it never is.
    """

    shape: tuple[int, int, int]
    bounds: tuple[float, float] | None

    def encode(self, images: th.Tensor) -> th.Tensor:
        """Images uint8 [B, H', W', 3] -> samples float32 [B, C, H, W] on the same device."""
        ...

    def decode(self, x: th.Tensor) -> np.ndarray:
        """Samples [B, C, H, W] -> images uint8 [B, H', W', 3] on the CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of the space its network was trained in, in JSON's types."""
        ...
