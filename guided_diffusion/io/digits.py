"""The embedded real data: scikit-learn's handwritten digits, so that the demo downloads nothing.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, of which scikit-learn ships the 1,797 test images.
"""

from functools import cache

import numpy as np

from ..errors import UserError

SIZE = 16
SIZES = (SIZE, 2 * SIZE)
CLASSES = 10


def digits_file(size: int) -> str:
    """The name of the file that holds all real digits at a size."""
    return "digits.npz" if size == SIZE else f"digits-{size}.npz"


@cache
def load_digit_images(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """All real digits as the demo's networks see them.

    The 8x8 values 0..16 are scaled to 0..255, rounded, enlarged with Pillow's bicubic filter (integer
    arithmetic, so equal on every machine) and repeated over three channels.

    Args:
        size: of the images in pixels.

    Returns:
        images uint8 [1797, size, size, 3] and labels int64 [1797] (0..9), both read-only.

    Raises:
        UserError: scikit-learn is not installed.
    """
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits need scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    small = np.rint(data.images * (255 / 16)).astype(np.uint8)
    gray = np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in small]
    )
    images = np.repeat(gray[..., None], 3, axis=-1)
    labels = data.target.astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels
