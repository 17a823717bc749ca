"""The reference side of a comparison: its statistics and features, cached beside its npz.

`REF.npz` gets a neighbour `REF.<backend>.ref-stats.npz`. It is believed only if it was made from a
file with the same SHA-256 by the same weights; otherwise it is made anew.
"""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path, sha256_of
from guided_diffusion.io.image_sets import ImageFile
from guided_diffusion.io.npz_reader import NpzFile

from .features import Extractor, choose_device, extract_features
from .metrics import Gaussian
from .neighbours import nearest_distances
from .settings import Settings

_FORMAT = 1  # raised whenever the arrays of a cache file change their meaning
_STORED_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        gaussian: of the features.
        spatial_gaussian: of the spatial features; None where there are none.
        features: float32 [N, D] of the reference images; None where only statistics are stored.
        neighbours: float64 [N, K], distances to the K nearest other features, ascending; None
            where `features` is None.
        sha256: of the reference npz.
        origin: "computed", "cached" or "stored".
    """

    gaussian: Gaussian
    spatial_gaussian: Gaussian | None
    features: np.ndarray | None
    neighbours: np.ndarray | None
    sha256: str
    origin: str

    @property
    def count(self) -> int | None:
        """Number of reference images; None where only statistics are stored."""
        return None if self.features is None else len(self.features)


def load_reference(
    npz: NpzFile, images: ImageFile | None, extractor: Extractor, settings: Settings
) -> Reference:
    """Statistics and features of a reference file by one extractor.

    Statistics that the file itself stores (Inception only) are used as they are. Features come
    from its images, through the cache.

    Args:
        npz: the reference file.
        images: its images; None if it holds stored statistics alone.
        extractor: the feature network.
        settings: the batch size, the device of the nearest neighbours, and whether to use the cache.

    Raises:
        UserError: damaged file, or stored statistics of the wrong shape.
    """
    sha256 = sha256_of(npz.path)
    stored = _stored_statistics(npz) if extractor.name != "digits" else {}
    if images is None:
        return Reference(stored["mu"], stored.get("mu_s"), None, None, sha256, "stored")
    key = {
        "format": _FORMAT,
        "images": sha256,
        "backend": extractor.name,
        "weights": extractor.weights_sha256,
    }
    path = cache_path(npz.path, extractor.name)
    reference = _read_cache(path, key) if settings.use_cache else None
    if reference is None:
        found = extract_features(extractor, images, settings.batch_size)
        reference = Reference(
            found.gaussian,
            found.spatial_gaussian,
            found.features,
            nearest_distances(found.features, device=choose_device(settings.device)),
            sha256,
            "computed",
        )
        if settings.use_cache:
            _write_cache(path, key, reference)
    if not stored:
        return reference
    return replace(
        reference,
        gaussian=stored.get("mu", reference.gaussian),
        spatial_gaussian=stored.get("mu_s", reference.spatial_gaussian),
        origin="stored",
    )


def _stored_statistics(npz: NpzFile) -> dict[str, Gaussian]:
    found = {}
    for mean_name, covariance_name in _STORED_PAIRS:
        if mean_name not in npz.headers or covariance_name not in npz.headers:
            continue
        dimension = 2048 if mean_name == "mu" else 2023
        for name, shape in ((mean_name, (dimension,)), (covariance_name, (dimension, dimension))):
            if npz.headers[name][0] != shape or npz.headers[name][1].kind != "f":
                actual, dtype = npz.headers[name]
                raise UserError(
                    f"{npz.path}: {name} is {dtype} {list(actual)}, "
                    f"Inception statistics are float {list(shape)}"
                )
        mean = npz.load(mean_name).astype(np.float64)
        covariance = npz.load(covariance_name).astype(np.float64)
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{npz.path}: {mean_name} or {covariance_name} holds NaN or infinity")
        found[mean_name] = Gaussian(mean, covariance)
        try:
            _ = found[mean_name].factor  # which is kept
        except UserError as error:
            raise UserError(f"{npz.path}: {covariance_name}: {error}") from None
    return found


def cache_path(path: Path, backend: str) -> Path:
    """Where the statistics of a reference file by one backend are kept."""
    return path.with_name(f"{path.name.removesuffix('.npz')}.{backend}.ref-stats.npz")


def _read_cache(path: Path, key: dict) -> Reference | None:
    """The cached reference; None if there is none or it was made from something else."""
    if not path.is_file():
        return None
    try:
        npz = NpzFile(path)
        found = npz.load_json("key")
        if found != key:
            _warn_of_stale_cache(path, found, key)
            return None
        spatial = Gaussian(npz.load("mu_s"), npz.load("sigma_s")) if "mu_s" in npz.headers else None
        gaussian = Gaussian(npz.load("mu"), npz.load("sigma"))
        features, neighbours = npz.load("features"), npz.load("neighbours")
        _require_consistent(gaussian, spatial, features, neighbours)
        return Reference(gaussian, spatial, features, neighbours, key["images"], "cached")
    except UserError as error:
        warnings.warn(f"{path}: unusable reference statistics are made anew ({error})", stacklevel=2)
        return None


def _require_consistent(
    gaussian: Gaussian, spatial: Gaussian | None, features: np.ndarray, neighbours: np.ndarray
) -> None:
    """Raise `UserError` unless cached arrays are finite and of shapes that belong together."""
    found = [features, neighbours, gaussian.mean, gaussian.covariance]
    wanted = [features.shape[-1:] * n for n in (1, 2)]
    fits = features.ndim == 2 and len(features) > 0 and neighbours.shape[:1] == features.shape[:1]
    fits = fits and neighbours.ndim == 2 and [gaussian.mean.shape, gaussian.covariance.shape] == wanted
    if spatial is not None:
        found += [spatial.mean, spatial.covariance]
        fits = fits and spatial.covariance.shape == 2 * spatial.mean.shape
    if not (fits and all(array.dtype.kind == "f" and np.isfinite(array).all() for array in found)):
        raise UserError("its arrays do not belong together, or are not finite")


def _warn_of_stale_cache(path: Path, found: dict, key: dict) -> None:
    if found.get("images") == key["images"] and found.get("weights") != key["weights"]:
        warnings.warn(
            f"{path} was made with other {key['backend']} weights (SHA-256 {str(found.get('weights'))[:12]}, "
            f"now {key['weights'][:12]}); scores of the two do not compare, it is made anew",
            stacklevel=2,
        )


def _write_cache(path: Path, key: dict, reference: Reference) -> None:
    arrays: dict[str, Any] = {
        "key": np.array(json.dumps(key)),
        "mu": reference.gaussian.mean,
        "sigma": reference.gaussian.covariance,
        "features": reference.features,
        "neighbours": reference.neighbours,
    }
    if reference.spatial_gaussian is not None:
        arrays["mu_s"] = reference.spatial_gaussian.mean
        arrays["sigma_s"] = reference.spatial_gaussian.covariance
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(f"reference statistics cannot be kept beside the file: {error}", stacklevel=2)
