"""Scores of images in memory, for a training that is scored as it goes on (`training.scoring.Judge`)."""

from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.config.settings import Run
from guided_diffusion.io.image_sets import ImageArray
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.progress import warn

from .evaluation import build_extractor, few, reference_images, require_scorable
from .reference import load_reference
from .results import values
from .scoring import score_samples
from .settings import Settings


class Judge:
    """One reference and one feature network, loaded once.

    The scores are the evaluator's, `evaluations.results` describes them; its "fd" or "fid" is "fd" here.

    Args:
        reference: npz of the real images, or with Inception their statistics alone.
        run: the backend, and the number of samples.
        image_size: height and width of the samples.

    Raises:
        UserError: the reference is missing or damaged, the network's library or weights are not there, or the
            samples do not suit the backend.
    """

    def __init__(self, reference: Path, run: Run, image_size: int):
        self.settings = Settings(backend=run.eval_backend)  # type: ignore[arg-type]
        keys = ("run.eval_backend", "run.eval_samples")
        require_scorable(self.settings, image_size, run.eval_samples, keys)
        if told := few(run.eval_samples, self.settings):
            warn(f"run.eval_samples: {told}")
        npz = NpzFile(reference)
        real = reference_images(npz, self.settings)
        self.extractor = build_extractor(self.settings)
        self.reference = load_reference(npz, real, self.extractor, self.settings)
        self.is_digits = self.settings.backend == "digits"
        self.metric = "digits-FD" if self.is_digits else f"FID-{run.eval_samples}"
        self.identity: dict[str, Any] = {
            "backend": self.settings.backend,
            "weights_sha256": self.extractor.weights_sha256,
            "reference_sha256": self.reference.sha256,
        }

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Scores by name of images uint8 [N, H, W, 3].

        Raises:
            UserError: the network answered with NaN or infinity.
        """
        file = ImageArray(images, Path("the samples"))
        scores = values(score_samples(file, self.reference, self.extractor, self.settings)[0])
        return {"fd": scores.pop("fd" if self.is_digits else "fid")} | scores
