"""Scores while training: what the network samples, against a reference, every so many iterations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch as th

from .. import dist_util
from ..config.settings import Run
from ..gaussian_diffusion import GaussianDiffusion
from ..io.progress import Progress
from ..networks.base import DenoisingNetwork
from ..sampling.samplers import sample_images
from ..spaces import SampleSpace


class Judge(Protocol):
    """What scores images. `evaluations.judge` has it; nothing in this package imports it.

    Attributes:
        metric: the name of its "fd", such as "FID-10000".
        identity: what it scores with and against, in JSON's types.
    """

    metric: str
    identity: dict[str, Any]

    def score(self, images: np.ndarray) -> dict[str, float]:
        """Scores by name of images uint8 [N, H, W, 3]; "fd", a Fréchet distance, is among them.

        Raises:
            UserError: they cannot be scored.
        """
        ...


@dataclass(frozen=True)
class Score:
    """What the samples of a step's weights scored.

    Attributes:
        metric: what `values["fd"]` is called.
        values: scores by name.
        of: what is equal where two scores compare, in JSON's types.
    """

    metric: str
    values: dict[str, float]
    of: dict[str, Any]

    def columns(self) -> dict[str, float]:
        """The scores as columns of progress.csv: `eval_fd`, `eval_precision`, ..."""
        return {f"eval_{name}": value for name, value in self.values.items()}

    def record(self, weights: str) -> dict[str, Any]:
        """What a checkpoint keeps of it, see `runs.best.add_score`; `weights` names what was scored."""
        record = {"metric": self.metric, "value": self.values["fd"], "scores": self.columns()}
        return record | {"weights": weights, "of": self.of}

    def __str__(self) -> str:
        """A line of them."""
        parts = [f"{name.replace('_', ' ')} {v:.4g}" for name, v in self.values.items() if name != "fd"]
        return ", ".join([f"{self.metric} {self.values['fd']:.4g}", *parts])


class Scorer:
    """Scores a network; every method is collective.

    What is scored is a function of the weights, (seed, number of the sample) and the process;
    `image_sample.py` draws the same set. Nothing of it touches the training.

    Args:
        load_judge: gives the judge of images of a height and width; called on rank 0 alone.
        run: how often, and how many samples.
        process: the respaced process to sample from.
        space: what the samples are.
        batch_size: samples at a time and rank.

    Raises:
        UserError: the judge cannot be had.
    """

    def __init__(
        self,
        load_judge: Callable[[int], Judge],
        run: Run,
        process: GaussianDiffusion,
        space: SampleSpace,
        batch_size: int,
    ):
        self.run, self.process, self.space, self.batch_size = run, process, space, batch_size
        self._judge: Judge | None = None

        def load() -> str:
            self._judge = load_judge(self.space.image_size)
            return self._judge.metric

        self.metric = dist_util.from_rank_zero(load)

    def due(self, step: int, last: bool) -> bool:
        """Whether a step is scored: a multiple of the interval, or the last one."""
        return step > 0 and (last or step % self.run.eval_interval == 0)

    def score(self, network: DenoisingNetwork, stop: Callable[[], bool]) -> Score | None:
        """Score the network's present weights.

        Args:
            network: on this rank's device, equal on all ranks.
            stop: whether this rank is asked to stop.

        Returns:
            None if a rank was asked to stop before all samples were drawn.

        Raises:
            UserError: the samples could not be scored.
        """
        images = self._draw(network, stop)
        if images is None:
            return None

        def judge() -> Score:
            assert self._judge is not None
            of = {**self._judge.identity, "samples": self.run.eval_samples, "seed": self.run.seed}
            of |= {"timesteps": self.process.num_timesteps}
            return Score(self._judge.metric, self._judge.score(images), of)

        return dist_util.from_rank_zero(judge)

    def _draw(self, network: DenoisingNetwork, stop: Callable[[], bool]) -> np.ndarray | None:
        """The set uint8 [N, H, W, 3] on rank 0, nothing on the others; None if one was asked to stop."""
        count, size, rank = self.run.eval_samples, self.space.image_size, dist_util.rank()
        kept = [np.zeros((0, size, size, 3), np.uint8)]
        with Progress(count, "drawing samples to score", "images", active=rank == 0) as progress:
            for start in range(0, count, self.batch_size * dist_util.world_size()):
                if dist_util.any_rank(stop()):
                    return None
                first = start + rank * self.batch_size
                indices = range(min(first, count), min(first + self.batch_size, count))
                batch = np.zeros((self.batch_size, size, size, 3), np.uint8)  # as large on all ranks
                if indices:
                    batch[: len(indices)] = sample_images(
                        network, self.process, self.space, indices, seed=self.run.seed
                    )[0]
                kept.append(dist_util.gather(th.from_numpy(batch)).numpy()[: count - start])
                progress.advance(len(kept[-1]))
        return np.concatenate(kept)
