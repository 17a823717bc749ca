"""What a diffusion process runs in: the pixels of images, or something that decodes to them."""

from .base import SampleSpace
from .latent import LatentSpace
from .pixel import PixelSpace

__all__ = ["LatentSpace", "PixelSpace", "SampleSpace"]
