"""The same Inception in PyTorch, through torch-fidelity's TensorFlow-compatible network."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from guided_diffusion.errors import UserError, first_line
from guided_diffusion.io.files import sha256_of
from guided_diffusion.io.torch_file import read_torch_file

from .features import choose_device
from .weight_files import check_hash_in_name, download_once

# What torch's reader of the format before 1.6 raises of a damaged file, and its loader of other weights.
_DAMAGE = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, EOFError),
    *(pickle.UnpicklingError, struct.error),
)

FEATURES = 2048
SPATIAL_CHANNELS = 7


def find_weights(path: Path | None) -> Path:
    """The weight file: the one given, or the one torch-fidelity publishes, downloaded.

    A file whose name carries a hash must have it.

    Raises:
        UserError: wrong hash, or it has to be downloaded and cannot be.
    """
    if path is not None:
        check_hash_in_name(path, path.name)
        return path
    url = _torch_fidelity().URL_INCEPTION_V3
    name = url.rsplit("/", 1)[1]
    found = download_once(url, lambda file: check_hash_in_name(file, name))
    check_hash_in_name(found, name)
    return found


class TorchExtractor:
    """Inception by torch-fidelity as a feature extractor (`features.Extractor`): D = 2048, S = 2023.

    What TensorFlow's graph calls `mixed_6/conv` is here the 1x1 branch of block `Mixed_6d`.

    Args:
        path: the weights, a plain state dict.
        device: torch device; None for a GPU if there is one.

    Raises:
        UserError: torch-fidelity does not import, no such device, or the file is not such weights.
    """

    name = "torch"
    dimension = FEATURES

    def __init__(self, path: Path, device: str | None = None) -> None:
        self._device = choose_device(device)
        self.weights_sha256 = sha256_of(path)
        module = _torch_fidelity()
        try:
            # torch-fidelity unpickles without restriction: it gets a copy of what was read, never the file.
            copy = io.BytesIO()
            torch.save(_read_state(path), copy)
            copy.seek(0)
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=copy
            )
        except _DAMAGE as error:
            reason = first_line(error)
            raise UserError(f"{path}: not the weights of torch-fidelity's Inception ({reason})") from None
        self._network = network.to(self._device)
        self._spatial = torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._classes = network.fc.weight.detach().cpu().numpy().T

    def _keep_spatial(self, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.inference_mode()
    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [N, 2048] and spatial features float32 [N, 2023] of uint8 [N, H, W, 3]."""
        batch = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            (pool,) = self._network(batch)
        spatial = self._spatial.permute(0, 2, 3, 1).reshape(len(images), -1)  # channels last, as in the graph
        return pool.cpu().numpy(), spatial.float().cpu().numpy()

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [N, classes] from features [N, 2048]."""
        return softmax(features @ self._classes, axis=1)


def _read_state(path: Path) -> Any:
    """What a weight file holds, without running anything in it."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            return read_torch_file(path)
    # The published weights are of a torch before 1.6, whose format `read_torch_file` does not know.
    return torch.load(path, map_location="cpu", weights_only=True)


def _torch_fidelity():
    """torch-fidelity's module of the network; it needs torchvision, which may not fit the torch here."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"the torch backend needs torch-fidelity and a torchvision that fits this torch ({error}); "
            "pip install torch-fidelity torchvision, or use --backend tensorflow"
        ) from None
    return feature_extractor_inceptionv3
