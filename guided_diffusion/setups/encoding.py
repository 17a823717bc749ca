"""Images encoded once: what plain training in a latent space reads instead of images."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch as th
from numpy.lib.format import open_memmap

from .. import dist_util
from ..errors import UserError
from ..image_datasets import ImageDataset
from ..io.files import atomic_path, held, remove_leftovers
from ..io.progress import Progress
from ..spaces import LatentSpace

_BLOCK = 256  # images read at a time


class EncodedDataset:
    """A dataset's images as the `LatentSpace.moments` of each, and of each mirrored if that is wanted.

    Args:
        path: an .npy of float32 [N, 1 or 2, M, H, W], memory-mapped.
        dataset: the images themselves, for their labels.

    Raises:
        UserError: a damaged file.
    """

    def __init__(self, path: Path, dataset: ImageDataset):
        try:
            self.moments = np.load(path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path}: damaged ({error}); remove it, and the images are encoded anew"
            ) from None
        self.labels, self.num_classes, self.path = dataset.labels, dataset.num_classes, path

    def __len__(self) -> int:
        return len(self.moments)

    def batch(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Moments float32 [B, M, H, W], of mirrored images where a bool [B] says so, and labels int64 [B]."""
        view = np.zeros(len(indices), np.int64) if mirrored is None else mirrored.astype(np.int64)
        return np.array(self.moments[indices, view]), self.labels[indices]

    def files(self) -> list[Path]:
        """The one file."""
        return [self.path]


def encode_dataset(
    dataset: ImageDataset, space: LatentSpace, random_flip: bool, cache: Path
) -> EncodedDataset:
    """Encode every image, or find what another run has encoded, or is encoding. Collective: rank 0 does it.

    The cache's file, CACHE/latents-KEY.npy, belongs to the VAE, to the images' files (their paths, sizes and
    times), to the image size and to `random_flip`: images that change are encoded anew.

    Args:
        dataset: images of the space's `image_size`.
        space: the latent space.
        random_flip: encode each mirrored image too.
        cache: where such files lie.

    Raises:
        UserError: an unreadable image.
    """
    stats = [(str(path.resolve()), path.stat()) for path in dataset.files()]
    key = {
        **space.identity(),
        "image_size": space.image_size,
        "random_flip": random_flip,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
    }
    path = cache / f"latents-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npy"
    cache.mkdir(parents=True, exist_ok=True)
    with dist_util.rank_zero_first() as first:
        if first and not path.is_file():
            with held(path, patience=math.inf):
                if not path.is_file():  # by now another process may have written it
                    remove_leftovers(cache, path.name)
                    with atomic_path(path) as temporary:
                        _write(temporary, dataset, space, 2 if random_flip else 1)
    return EncodedDataset(path, dataset)


def _write(path: Path, dataset: ImageDataset, space: LatentSpace, views: int) -> None:
    device, file = dist_util.dev(), None
    with Progress(len(dataset), "encoding", "images") as progress:
        for start in range(0, len(dataset), _BLOCK):
            indices = np.arange(start, min(start + _BLOCK, len(dataset)))
            images = th.from_numpy(dataset.batch(indices)[0]).to(device)
            for view in range(views):
                moments = space.moments(images.flip(2) if view else images).cpu().numpy()
                if file is None:
                    file = open_memmap(path, "w+", np.float32, (len(dataset), views, *moments.shape[1:]))
                file[indices, view] = moments
            progress.advance(len(indices))
    assert file is not None
    file.flush()
