"""Pixels: RGB images whose 256 levels are mapped onto [-1, 1], as in DDPM (Ho et al., 2020, section 3.3)."""

from typing import Any

import numpy as np
import torch as th


class PixelSpace:
    """RGB images of one size as samples in [-1, 1].

    Args:
        image_size: H = W.
    """

    channels = 3
    bounds: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, image_size: int):
        self.shape = (self.channels, image_size, image_size)
        self.image_size = image_size

    def encode(self, images: th.Tensor) -> th.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
        return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()

    def decode(self, x: th.Tensor) -> np.ndarray:
        """[B, 3, H, W], clipped to [-1, 1] -> uint8 [B, H, W, 3]; levels are cut off, as in ADM."""
        levels = ((x + 1) * 127.5).clamp(0, 255).to(th.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    def identity(self) -> dict[str, Any]:
        """Pixels are pixels."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Kind and shape."""
        return {"kind": "pixels", "shape": list(self.shape)}
