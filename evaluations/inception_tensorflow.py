"""The ADM suite's feature path: the frozen TensorFlow graph of Inception of December 2015.

The graph takes float32 images 0..255 at `ExpandDims:0` and resizes them to 299x299 itself.
Features are `pool_3:0`, spatial features the first 7 channels of `mixed_6/conv:0`, and class
probabilities the softmax of the features through the weights of `softmax/logits/MatMul`, without
its bias (Dhariwal & Nichol 2021, appendix on evaluation; Nash et al. 2021 for the spatial part).
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from guided_diffusion.errors import UserError, first_line

from .weight_files import download_once

URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb"
FEATURES = 2048
SPATIAL_CHANNELS = 7
_REQUIRED = ("ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul")


def find_graph(path: Path | None) -> Path:
    """The graph file: the one given, or the downloaded one.

    Raises:
        UserError: it has to be downloaded and cannot be.
    """
    return path if path is not None else download_once(URL, lambda file: _parse(file.read_bytes(), file))


class TensorflowExtractor:
    """Inception by TensorFlow as a feature extractor (`features.Extractor`): D = 2048, S = 2023.

    Args:
        path: the frozen graph.

    Raises:
        UserError: TensorFlow is not installed, or the file is not such a graph.
    """

    name = "tensorflow"
    dimension = FEATURES

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        definition = _parse(data, path)
        tf = _tensorflow()
        graph = tf.compat.v1.Graph()
        with graph.as_default():
            images = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
            try:
                pool, spatial, logits = tf.compat.v1.import_graph_def(
                    definition,
                    input_map={"ExpandDims:0": images},
                    return_elements=["pool_3:0", "mixed_6/conv:0", "softmax/logits/MatMul"],
                    name="",
                )
                weights = logits.inputs[1]
            except (ValueError, IndexError) as error:
                reason = first_line(error)
                raise UserError(f"{path}: TensorFlow cannot use this graph ({reason})") from None
            shapes = {name: tensor.shape for name, tensor in (("pool_3", pool), ("softmax weights", weights))}
            if pool.shape.rank != 4 or pool.shape[3] != FEATURES or weights.shape[0] != FEATURES:
                raise UserError(f"{path}: not Inception's widths: {shapes}, {FEATURES} features are expected")
            self._fetches = (pool, spatial[..., :SPATIAL_CHANNELS])
        self._images = images
        options = tf.compat.v1.ConfigProto()
        options.gpu_options.allow_growth = True  # leave room for the nearest neighbours
        self._session = tf.compat.v1.Session(graph=graph, config=options)
        self._classes: np.ndarray = self._session.run(weights)

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [N, 2048] and spatial features float32 [N, 2023] of uint8 [N, H, W, 3]."""
        pool, spatial = self._session.run(self._fetches, {self._images: images.astype(np.float32)})
        return pool.reshape(len(images), -1), spatial.reshape(len(images), -1)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [N, classes] from features [N, 2048]."""
        return softmax(features @ self._classes, axis=1)


def _parse(data: bytes, path: Path) -> Any:
    """The GraphDef in a file's bytes, after a check that it has the nodes that are used here."""
    definition = _tensorflow().compat.v1.GraphDef()
    from google.protobuf.message import DecodeError

    try:
        definition.ParseFromString(data)
    except DecodeError:
        raise UserError(f"{path}: not a TensorFlow graph (damaged, or something else)") from None
    names = {node.name for node in definition.node}
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise UserError(f"{path}: a TensorFlow graph without the nodes {', '.join(missing)}: not Inception")
    for node in definition.node:
        # Shapes recorded for one image would contradict batches.
        node.attr.pop("_output_shapes", None)
    return definition


def _tensorflow() -> Any:
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            with _without_notices():
                import tensorflow
        except ImportError as error:
            raise UserError(
                f"the tensorflow backend needs TensorFlow: pip install tensorflow-cpu ({error})"
            ) from None
        return tensorflow
    return sys.modules["tensorflow"]


@contextmanager
def _without_notices() -> Iterator[None]:
    """Hold back what TensorFlow's libraries write to descriptor 2 and pass on all but their notices.

    The notices come before any log level is looked at, so no setting silences them.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines(keepends=True):
                if not line.startswith(("I0000 ", "WARNING: All log messages before absl")):
                    sys.stderr.write(line)
