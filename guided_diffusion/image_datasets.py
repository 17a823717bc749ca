"""Images for plain training: a folder of images, an `.npz`, or a folder of `.npz` shards.

What the global batch of step k holds is a function of (seed, k): ranks take consecutive shares of it, so
any number of ranks sees the same data, and a run resumes exactly from the number of its step alone.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch as th

from . import dist_util
from .errors import UserError
from .io.npz_reader import NpzFile
from .processes.stopping import ignore_signals

_Batch = tuple[np.ndarray, np.ndarray]  # indices int64 [B], and which images are mirrored, bool [B]
_FLIPS = 1024  # places whose flips are drawn together
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")  # Pillow's names of them
_MOST_PIXELS, _LONGEST = 89_478_485, 50  # Pillow warns above the former; times as long as wide


class ImageDataset(Protocol):
    """Images by number.

    Attributes:
        labels: int64 [N], zeros without labels.
        num_classes: number of classes; 0 without labels.
    """

    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, H, W, 3], mirrored where a bool [B] is true, and labels int64 [B] (or zeros)."""
        ...

    def files(self) -> list[Path]:
        """What it is read from."""
        ...


def open_dataset(data_dir: str | Path, image_size: int, class_cond: bool) -> ImageDataset:
    """Open a dataset.

    Args:
        data_dir: an `.npz` with uint8 [N, H, W, 3] in `arr_0` and, for labels, integers [N] in `arr_1`;
            a folder of such; or a folder tree of images. There the class is the name of the folder
            an image lies in or, when all lie in one folder, what stands before the first "_" of
            its name; classes are numbered in sorted order.
        image_size: H = W. Images of a folder tree are resized to it (`center_crop`), arrays are not.
        class_cond: whether labels are needed.

    Raises:
        UserError: nothing there, another image size or dtype, labels needed but missing.
    """
    path = Path(data_dir)
    if path.is_file():
        return ArrayDataset([path], image_size, class_cond)
    if not path.is_dir():
        raise UserError(f"no such dataset: {path}")
    # The evaluator's statistics lie beside what they are of.
    if shards := sorted(p for p in path.glob("*.npz") if not p.name.endswith(".ref-stats.npz")):
        if any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.iterdir()):
            dist_util.warn(f"{path}: its .npz files are the dataset, the images beside them are not read")
        return ArrayDataset(shards, image_size, class_cond)
    return FolderDataset(path, image_size, class_cond)


class ArrayDataset:
    """One or several npz archives; those stored uncompressed are memory-mapped, the others loaded once."""

    def __init__(self, paths: list[Path], image_size: int, class_cond: bool):
        self.paths = paths
        self.arrays: list[np.ndarray] = []
        labels = []
        for path in paths:
            archive = NpzFile(path)
            shape, dtype = archive.require("arr_0")
            if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (image_size, image_size, 3):
                wanted = f"uint8 [N, {image_size}, {image_size}, 3]"
                raise UserError(f"{path}: arr_0 is {dtype} {list(shape)}, this network needs {wanted}")
            self.arrays.append(_mapped(archive))
            if class_cond:
                label = archive.load("arr_1")
                if label.shape != shape[:1] or not np.issubdtype(label.dtype, np.integer):
                    raise UserError(f"{path}: arr_1 must be integers [{shape[0]}], one label per image")
                label = label.astype(np.int64)
                if len(label) and label.min() < 0:
                    raise UserError(f"{path}: arr_1 holds negative labels")
                labels.append(label)
        self.starts = np.cumsum([0, *(len(array) for array in self.arrays)])
        if not len(self):
            raise UserError(f"{paths[0] if len(paths) == 1 else paths[0].parent}: holds no images")
        self.labels = np.concatenate(labels) if labels else np.zeros(len(self), np.int64)
        self.num_classes = int(self.labels.max()) + 1 if labels else 0

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `ImageDataset.batch`."""
        shard = np.searchsorted(self.starts, indices, side="right") - 1
        rows = [self.arrays[s][i - self.starts[s]] for s, i in zip(shard, indices, strict=True)]
        return _mirrored(np.stack(rows), mirrored), self.labels[indices]

    def files(self) -> list[Path]:
        """The archives."""
        return self.paths


class FolderDataset:
    """A folder tree of image files, read and resized as they are asked for."""

    def __init__(self, root: Path, image_size: int, class_cond: bool):
        self.image_size = image_size
        self.paths = list_images(root)
        self.labels = np.zeros(len(self.paths), np.int64)
        self.num_classes = 0
        if class_cond:
            classes, self.labels = np.unique(class_names(self.paths), return_inverse=True)
            self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `ImageDataset.batch`."""
        images = [read_image(self.paths[i], self.image_size) for i in indices]
        return _mirrored(np.stack(images), mirrored), self.labels[indices]

    def files(self) -> list[Path]:
        """The image files."""
        return self.paths


def _mirrored(images: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
    """Mirror, in place, the images of [B, H, W, 3] where a bool [B] is true."""
    if mirrored is not None:
        images[mirrored] = images[mirrored, :, ::-1]
    return images


def list_images(root: Path) -> list[Path]:
    """All image files below a folder, in sorted order.

    Links to folders are followed, after what lies there itself, and no folder is read twice.

    Raises:
        UserError: there are none.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    tops = [root]
    while tops:
        links: list[Path] = []
        for folder, inner, names in (one for top in tops for one in os.walk(top)):
            if (real := os.path.realpath(folder)) in seen:
                inner.clear()
                continue
            seen.add(real)
            links += (link for name in inner if (link := Path(folder, name)).is_symlink())
            files = (Path(folder, name) for name in names)
            paths += (path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        tops = sorted(links)
    paths.sort()
    if not paths:
        raise UserError(f"{root}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def class_names(paths: list[Path]) -> list[str]:
    """The class of each image; see `open_dataset`.

    Raises:
        UserError: all lie in one folder and a name has no "_"; or a folder of images lies in another.
    """
    folders = {path.parent for path in paths}
    if mixed := sorted(folder for folder in folders if folders & {*folder.parents}):
        raise UserError(
            f"{mixed[0]}: images lie here and in a folder above; for labels use a folder per class, or one "
            "folder of CLASS_number.png"
        )
    if len(folders) > 1:
        pairs = {(path.parent, path.name.partition("_")[0]) for path in paths if "_" in path.name}
        shared = [prefix for prefix, count in Counter(prefix for _, prefix in pairs).items() if count > 1]
        if len(shared) > 1:
            dist_util.warn(
                f"labels are the names of {len(folders)} folders, though their files' names begin alike "
                f"({', '.join(sorted(shared)[:3])}); for those as labels put all files into one folder"
            )
        return [path.parent.name for path in paths]
    for path in paths:
        if "_" not in path.name:
            raise UserError(
                f"{path}: labels are needed; name files CLASS_number.png or use a folder per class"
            )
    return [path.name.partition("_")[0] for path in paths]


def read_image(path: Path, size: int) -> np.ndarray:
    """An image file as uint8 [size, size, 3], RGB, by `center_crop`.

    Raises:
        UserError: unreadable, of more than 8 bits per channel (Pillow would clip it, not scale it), of more
            than 89 million pixels, or more than 50 times as long as wide.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # What the suffixes name and nothing else: for others Pillow starts programs, such as Ghostscript.
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS or max(image.size) > _LONGEST * min(image.size):
                raise UserError(f"{path}: of {image.width}x{image.height} pixels, too large or too thin")
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits per channel; convert it to 8 bits first")
            return center_crop(image.convert("RGB"), size)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from None


def center_crop(image, size: int) -> np.ndarray:
    """Scale the shorter side of a PIL image to `size` and cut out the middle square.

    Halved by box averages while at least twice too large, then bicubic; an image of the right size
    is left as it is.

    Returns:
        uint8 [size, size, 3].
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    if target != image.size:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def sample_batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    num_workers: int = 0,
    random_flip: bool = False,
) -> Generator[tuple[th.Tensor, th.Tensor], None, None]:
    """Endless batches; every epoch is a fresh permutation, and batches run on across epochs.

    Args:
        dataset: the images.
        batch_size: of this rank.
        seed: of the permutations.
        rank: which share of each global batch.
        world_size: of how many shares.
        start_step: the first step.
        num_workers: processes that load images; 0 for this one.
        random_flip: mirror each image with probability 1/2, decided by (seed, its place in all batches).

    Yields:
        Images uint8 [B, H, W, 3], labels int64 [B].

    Raises:
        UserError: an unreadable image.
    """
    loader = th.utils.data.DataLoader(
        _Fetch(dataset),
        sampler=_batches(len(dataset), batch_size, seed, rank, world_size, start_step, random_flip),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=th.cuda.is_available(),
        worker_init_fn=ignore_signals,
        # The loader seeds its workers from this; ours draw nothing, and the loop's stream stays untouched.
        generator=th.Generator(),
    )
    for loaded in loader:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


def _batches(
    size: int, batch_size: int, seed: int, rank: int, world_size: int, start_step: int, random_flip: bool
) -> Iterator[_Batch]:
    """For each step from `start_step` on, this rank's share of the global batch."""
    position = (start_step * world_size + rank) * batch_size
    orders: dict[int, np.ndarray] = {}
    while True:
        positions = np.arange(position, position + batch_size)
        epochs = (positions // size).tolist()
        for epoch in sorted(set(epochs)):
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(size)
        orders = {epoch: order for epoch, order in orders.items() if epoch >= epochs[0]}
        indices = np.array([orders[e][p % size] for e, p in zip(epochs, positions, strict=True)])
        yield indices, _flips(positions, seed) if random_flip else np.zeros(batch_size, dtype=bool)
        position += world_size * batch_size


def _flips(positions: np.ndarray, seed: int) -> np.ndarray:
    """Which are mirrored, bool [B]: any number of ranks decides alike, since places are counted over all."""
    blocks = np.unique(positions // _FLIPS)
    draws = {b: np.random.default_rng([seed, 1, b]).random(_FLIPS) < 0.5 for b in blocks.tolist()}
    return np.array([draws[p // _FLIPS][p % _FLIPS] for p in positions.tolist()])


class _Fetch(th.utils.data.Dataset[tuple[th.Tensor, th.Tensor] | UserError]):
    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, batch: _Batch) -> tuple[th.Tensor, th.Tensor] | UserError:
        """Images uint8 [B, H, W, 3] and labels int64 [B]."""
        try:
            images, labels = self.dataset.batch(*batch)
        except UserError as error:
            return error  # raised by `sample_batches`: the loader would wrap it in a traceback
        return th.from_numpy(images), th.from_numpy(labels)


def _mapped(archive: NpzFile) -> np.ndarray:
    """`arr_0`, memory-mapped if its archive stores it uncompressed."""
    shape, dtype = archive.require("arr_0")
    with zipfile.ZipFile(archive.path) as zipped:
        info = zipped.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED or not info.file_size:
            return archive.load("arr_0")
    with open(archive.path, "rb") as file:
        # The local header repeats name and extra field, whose lengths stand at its end.
        file.seek(info.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
    end = info.header_offset + 30 + name_length + extra_length + info.file_size
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.memmap(archive.path, dtype, "r", offset=end - size, shape=shape)
