"""What real digits score against the real digits: the floor that a generator's score is read against."""

from dataclasses import dataclass
from os import PathLike

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import SIZES
from guided_diffusion.io.image_sets import open_images
from guided_diffusion.io.npz_reader import NpzFile

from .digits import is_noise
from .digits_classifier import DEFAULT_WEIGHTS, DigitsExtractor
from .features import extract_features
from .metrics import frechet_distance, gaussian_of
from .reference import Reference
from .scoring import score_digits


@dataclass(frozen=True)
class RealFloor:
    """Scores of n real images drawn at random, averaged over the draws.

    Attributes:
        fd: mean digits-FD; greater than 0 because n images do not show the whole distribution.
        fd_std: standard deviation of the digits-FD over the draws.
        confidence: mean probability of the likeliest class over all reference images.
        class_balance: of all reference images.
        noise_share: of all reference images.
        n: images in a draw.
        draws: how many draws.
    """

    fd: float
    fd_std: float
    confidence: float
    class_balance: float
    noise_share: float
    n: int
    draws: int


def real_floor(reference: str | PathLike, n: int, *, draws: int = 100) -> RealFloor:
    """The digits scores of a perfect generator: n images drawn from the reference itself.

    A Fréchet distance of finitely many images is biased upwards, the more the fewer they are, so
    the floor belongs to a number of images: pass that of the samples it stands beside. Each draw
    takes n reference images independently (with replacement), as a generator whose distribution is
    exactly that of the reference would, and is scored against the whole reference. It is a lower
    bound: real digits that are not in the reference score higher, because the reference too is
    finite, and a score below the floor means fewer repetitions than chance would give, no better
    images. One half of the reference against the other would measure something else: both sides
    would be half as large as those of the scores it stands beside.

    Args:
        reference: npz with `arr_0` uint8 [M, 16, 16, 3] or [M, 32, 32, 3].
        n: number of images a draw holds, at least 2.
        draws: number of draws, at least 2.

    Raises:
        UserError: a file is missing or not what it should be, or a number is too small.
    """
    if n < 2 or draws < 2:
        raise UserError(f"a floor needs at least 2 images and 2 draws, not {n} and {draws}")
    images = open_images(NpzFile(reference), at_least=2, sizes=SIZES)
    extractor = DigitsExtractor(DEFAULT_WEIGHTS)
    real = extract_features(extractor, images, 256)
    generator = np.random.default_rng(0)
    distances = [
        frechet_distance(real.gaussian, gaussian_of(real.features[generator.integers(images.count, size=n)]))
        for _ in range(draws)
    ]
    noise = np.concatenate([is_noise(batch) for batch in images.batches(256)])
    own = Reference(real.gaussian, None, None, None, "", "computed")
    whole = score_digits(own, real, extractor.probabilities(real.features), noise)
    return RealFloor(
        fd=float(np.mean(distances)),
        fd_std=float(np.std(distances, ddof=1)),
        confidence=whole.confidence,
        class_balance=whole.class_balance,
        noise_share=whole.noise_share,
        n=n,
        draws=draws,
    )
