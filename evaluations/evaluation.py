"""One evaluation from files to results: check everything, build the network, extract, score."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import SIZES
from guided_diffusion.io.files import sha256_of
from guided_diffusion.io.image_sets import ImageFile, open_images
from guided_diffusion.io.npz_reader import NpzFile

from .results import DigitsResult, InceptionResult, Result, versions
from .settings import Settings

if TYPE_CHECKING:
    from .features import Extractor

_DIMENSION = {"tensorflow": 2048, "torch": 2048, "digits": 64}
IMAGE_SIZES = {"tensorflow": (), "torch": (), "digits": SIZES}  # of square images; none: any
AT_LEAST = 6  # images with five neighbours each


def evaluate_files(reference: Path, samples: Sequence[Path], settings: Settings) -> Iterator[Result]:
    """Score sample files against one reference, in order, each given out when it is done.

    The files' headers are all checked before the first is scored; a file whose contents turn out
    to be damaged ends the run at its turn. `results` describes the scores.

    Raises:
        UserError: a mistake in the files, in one line.
    """
    real_npz = NpzFile(reference)
    real = reference_images(real_npz, settings)
    # A half-sample must be enough for every score too.
    needed = 2 * AT_LEAST if settings.intervals else AT_LEAST
    generated = [
        open_images(NpzFile(path), at_least=needed, sizes=IMAGE_SIZES[settings.backend]) for path in samples
    ]
    provenances = [_provenance(file.npz) for file in generated]
    for file in (*([real] if real else []), *generated):
        if real is not None and (file.height, file.width) != (real.height, real.width):
            seen = "16x16" if settings.backend == "digits" else "299x299"
            warnings.warn(
                f"{file.path}: images of {file.height}x{file.width}, those of the reference are "
                f"{real.height}x{real.width}; the network resizes both to {seen}, which the scores see too",
                stacklevel=2,
            )
        counted = file is not real or not _has_statistics(real_npz, settings)
        if counted and (told := few(file.count, settings)):
            warnings.warn(f"{file.path}: {told}", stacklevel=2)
    # The networks' libraries are imported only now: mistakes above are told at once.
    from .reference import load_reference
    from .scoring import score_samples

    extractor = build_extractor(settings)
    known = load_reference(real_npz, real, extractor, settings)
    result: Any = DigitsResult if settings.backend == "digits" else InceptionResult
    for file, provenance in zip(generated, provenances, strict=True):
        scores, intervals = score_samples(file, known, extractor, settings)
        yield result(
            **vars(scores),
            samples=str(file.path),
            samples_sha256=sha256_of(file.path),
            samples_provenance=provenance,
            n=file.count,
            reference=str(reference),
            reference_sha256=known.sha256,
            n_reference=known.count,
            reference_statistics=known.origin,
            backend=settings.backend,
            weights_sha256=extractor.weights_sha256,
            seed=settings.seed,
            intervals=intervals,
            interval_replicates=settings.intervals,
            versions=versions(),
        )


def require_scorable(settings: Settings, image_size: int, count: int, keys: tuple[str, str]) -> None:
    """Refuse images of a size, or a number of them, that a backend does not score.

    Args:
        settings: the backend.
        image_size: their height and width in pixels.
        count: how many.
        keys: what names the backend and the number, for messages.

    Raises:
        UserError: another size, or too few.
    """
    sizes = IMAGE_SIZES[settings.backend]
    if sizes and image_size not in sizes:
        known = " or ".join(f"{size}x{size}" for size in sizes)
        raise UserError(
            f"{keys[0]}: {settings.backend} scores images of {known}, not of {image_size}x{image_size}; "
            "torch and tensorflow score any"
        )
    if count < AT_LEAST:
        raise UserError(f"{keys[1]} must be at least {AT_LEAST}, not {count}")


def few(count: int, settings: Settings) -> str:
    """What to warn of if so many images are too few for a Fréchet distance that means something by itself."""
    if count >= _DIMENSION[settings.backend]:
        return ""
    return (
        f"{count} images are fewer than the {_DIMENSION[settings.backend]} features: Fréchet distances are "
        "far too high, compare only equal numbers of images"
    )


def reference_images(npz: NpzFile, settings: Settings) -> ImageFile | None:
    """The reference's images; None if it holds stored Inception statistics alone.

    Raises:
        UserError: images or statistics that cannot be used, or statistics where images are needed.
    """
    if "arr_0" not in npz.headers and _has_statistics(npz, settings):
        if settings.density_coverage or settings.kid:
            raise UserError(f"{npz.path}: holds statistics alone; KID, density and coverage need its images")
        return None
    return open_images(npz, at_least=AT_LEAST, sizes=IMAGE_SIZES[settings.backend])


def _provenance(npz: NpzFile) -> dict[str, Any] | None:
    """What `image_sample.py` recorded in a file; unreadable it is left out, as scores do not need it."""
    if "provenance" not in npz.headers:
        return None
    try:
        return npz.load_json("provenance")
    except UserError as error:
        warnings.warn(f"{error}; it is left out of the record", stacklevel=2)
        return None


def _has_statistics(npz: NpzFile, settings: Settings) -> bool:
    """Whether the file stores statistics of these features itself, as ADM reference batches do."""
    return settings.backend != "digits" and "mu" in npz.headers and "sigma" in npz.headers


def build_extractor(settings: Settings) -> "Extractor":
    """The feature network that the settings name.

    Raises:
        UserError: its weights or its library are not there.
    """
    weights = None if settings.weights is None else Path(settings.weights)
    if settings.backend == "digits":
        from .digits_classifier import DEFAULT_WEIGHTS, DigitsExtractor

        return DigitsExtractor(weights or DEFAULT_WEIGHTS)
    if settings.backend == "torch":
        from .inception_torch import TorchExtractor, find_weights

        return TorchExtractor(find_weights(weights), settings.device)
    from .inception_tensorflow import TensorflowExtractor, find_graph

    return TensorflowExtractor(find_graph(weights))
