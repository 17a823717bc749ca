"""From images to features: the interface of a feature extractor, and what is kept of a set."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from guided_diffusion.errors import UserError, first_line
from guided_diffusion.io.image_sets import Images
from guided_diffusion.io.progress import Progress

from .metrics import Gaussian, GaussianAccumulator, gaussian_of


class Extractor(Protocol):
    """A frozen network that turns images into features.

    Attributes:
        name: the backend's name, part of a cached reference's key.
        weights_sha256: SHA-256 of its weight file, likewise.
        dimension: D of the features.
    """

    name: str
    weights_sha256: str
    dimension: int

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features float32 [N, D] and spatial features float32 [N, S], or None, of uint8 [N, H, W, 3]."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [N, classes] from features [N, D]."""


@dataclass(frozen=True)
class FeatureSet:
    """What the scores need of a set of images.

    Attributes:
        features: float32 [N, D].
        gaussian: of the features.
        spatial_gaussian: of the spatial features, None where the extractor has none.
        spatial: float32 [N, S]; kept only where scores of subsets are wanted.
    """

    features: np.ndarray
    gaussian: Gaussian
    spatial_gaussian: Gaussian | None
    spatial: np.ndarray | None = None

    def subset(self, rows: np.ndarray) -> "FeatureSet":
        """The set of some of the images; needs `spatial` where there are spatial features."""
        features = self.features[rows]
        spatial = None if self.spatial is None else self.spatial[rows]
        return FeatureSet(
            features, gaussian_of(features), None if spatial is None else gaussian_of(spatial), spatial
        )


def extract_features(
    extractor: Extractor, images: Images, batch_size: int, *, keep_spatial: bool = False
) -> FeatureSet:
    """Run all images of a set through an extractor, in order.

    Memory: 4 D bytes an image (8 kB for Inception), 4 (D + S) if the spatial features are kept,
    and the two covariances.

    Raises:
        UserError: their file is damaged, or the network answered with NaN or infinity.
    """
    features = np.empty((images.count, extractor.dimension), dtype=np.float32)
    kept: np.ndarray | None = None
    pooled, spread = GaussianAccumulator(), GaussianAccumulator()
    done, has_spatial = 0, False
    with Progress(images.count, images.path.name, "images") as progress:
        for batch in images.batches(batch_size):
            block, spatial = extractor.extract(batch)
            if not np.isfinite(block).all():
                raise UserError(f"{images.path}: the {extractor.name} network gives NaN or infinity")
            features[done : done + len(batch)] = block
            pooled.update(block)
            if spatial is not None:
                has_spatial = True
                spread.update(spatial)
                if keep_spatial:
                    if kept is None:
                        kept = np.empty((images.count, spatial.shape[1]), dtype=np.float32)
                    kept[done : done + len(batch)] = spatial
            done += len(batch)
            progress.advance(len(batch))
    return FeatureSet(
        features,
        pooled.result(),
        spread.result() if has_spatial else None,
        kept,
    )


def choose_device(wanted: str | None) -> torch.device:
    """The device asked for, else a GPU if there is one, else the CPU.

    Raises:
        UserError: no device of that name here.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{wanted}' cannot be used: {first_line(error)}") from None
    return device
