"""The small network whose features and predictions score 16x16 digits.

The weights ship as `model/digits_classifier.pt`; `train_digits_classifier.py` made them.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from guided_diffusion.errors import UserError, first_line
from guided_diffusion.io.digits import CLASSES, SIZE
from guided_diffusion.io.files import sha256_of
from guided_diffusion.io.shipped import SHIPPED
from guided_diffusion.io.torch_file import read_torch_file

FEATURES = 64
DEFAULT_WEIGHTS = SHIPPED / "model" / "digits_classifier.pt"


class DigitsClassifier(nn.Module):
    """Three convolutions, a 64-d feature layer and a linear read-out: 89,546 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * (SIZE // 4) ** 2, FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)
        self.dropout = nn.Dropout(0.3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate activations, non-negative.

        Args:
            x: float32 [N, 1, 16, 16] in [-1, 1].

        Returns:
            float32 [N, 64].
        """
        h = F.relu(self.conv1(x))  # [N, 16, 16, 16]
        h = F.relu(self.conv2(h))  # [N, 32,  8,  8]
        h = F.relu(self.conv3(h))  # [N, 64,  4,  4]
        h = self.dropout(h.flatten(1))  # [N, 1024]
        return F.relu(self.hidden(h))  # [N, 64]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Unnormalised log probabilities float32 [N, 10] of images [N, 1, 16, 16] in [-1, 1]."""
        return self.out(self.dropout(self.features(x)))


def to_input(images: np.ndarray) -> torch.Tensor:
    """Images uint8 [N, 16 k, 16 k, 3] as the network wants them: grey, k x k blocks averaged, [-1, 1]."""
    gray = torch.from_numpy(np.asarray(images, dtype=np.float32).mean(axis=3)[:, None])
    return F.avg_pool2d(gray, gray.shape[-1] // SIZE) / 127.5 - 1


def load_classifier(path: Path = DEFAULT_WEIGHTS) -> DigitsClassifier:
    """The trained classifier, in evaluation mode, float32 on the CPU.

    Raises:
        UserError: no file there, or its contents are not this network's weights.
    """
    if not path.is_file():
        raise UserError(
            f"no digits classifier at {path}; "
            "train one with python evaluations/train_digits_classifier.py --out PATH"
        )
    state = read_torch_file(path)
    model = DigitsClassifier()
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: not the weights of the digits classifier ({reason})") from None
    return model.eval()


class DigitsExtractor:
    """The classifier as a feature extractor (`features.Extractor`): D = 64, no spatial features.

    Args:
        path: its weights; the shipped ones by default.

    Raises:
        UserError: as `load_classifier`.
    """

    name = "digits"
    dimension = FEATURES

    def __init__(self, path: Path = DEFAULT_WEIGHTS) -> None:
        self._model = load_classifier(path)
        self.weights_sha256 = sha256_of(path)

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> tuple[np.ndarray, None]:
        """Features float32 [N, 64] of images uint8 [N, 16, 16, 3] or [N, 32, 32, 3]."""
        return self._model.features(to_input(images)).numpy(), None

    @torch.inference_mode()
    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [N, 10] from features [N, 64]."""
        return self._model.out(torch.from_numpy(features)).softmax(1).numpy()
