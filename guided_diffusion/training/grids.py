"""Grids of samples while training, for a person: of the raw weights, of their average, of the teacher."""

from dataclasses import dataclass

from .. import dist_util
from ..config.settings import Denoiser, Run
from ..gaussian_diffusion import GaussianDiffusion
from ..logger import RunLog
from ..networks.base import DenoisingNetwork
from ..runs.figures import save_grid
from ..sampling.samplers import sample_images
from ..script_util import build_process
from ..spaces import SampleSpace
from .ema import Ema

TEACHER_GRID = "samples_teacher.png"


def sampling_process(denoiser: Denoiser, run: Run) -> GaussianDiffusion:
    """The process respaced by `run.sample_respacing`, which grids and scores are sampled from.

    One that is respaced already keeps its steps: the network knows no others.

    Raises:
        UserError: impossible respacing.
    """
    own = build_process(denoiser, "timestep_respacing")
    if own.num_timesteps < denoiser.process.diffusion_steps:
        return own
    respacing = run.sample_respacing
    if respacing.isdigit():
        respacing = str(min(denoiser.process.diffusion_steps, int(respacing)))
    return build_process(denoiser, "run.sample_respacing", respacing)


@dataclass
class Grids:
    """Grids of the first samples of `seed`, all from the same noise and, with classes, the same labels.

    Attributes:
        process: the respaced process of the network that is trained.
        space: what the samples are.
        count: samples in a grid.
        seed: of the samples, as `sampling.samplers.sample_images` has it.
        teacher: a network and its respaced process, whose grid is drawn once.
        teacher_is_recorded: whether this process has recorded it.
    """

    process: GaussianDiffusion
    space: SampleSpace
    count: int
    seed: int
    teacher: tuple[DenoisingNetwork, GaussianDiffusion] | None = None
    teacher_is_recorded: bool = False

    def save(
        self, step: int, network: DenoisingNetwork, ema: Ema | None, log: RunLog, *, anew: bool = True
    ) -> None:
        """Draw on rank 0, write PNGs, and record them; the other ranks wait.

        Args:
            step: iterations done; samplesSTEP.png is of the average, or without one of the weights
                themselves, which otherwise have samples_rawSTEP.png.
            network: with the weights themselves.
            ema: their average.
            log: the record.
            anew: also if the step has its grids already.
        """
        with dist_util.rank_zero_first() as first:
            name = f"samples{step:06d}.png"
            if not first or (not anew and (log.directory / name).exists()):
                return
            if self.teacher is not None and not self.teacher_is_recorded:
                if (log.directory / TEACHER_GRID).exists():
                    log.picture(step, "samples/teacher", log.directory / TEACHER_GRID)
                else:
                    self._draw(step, "teacher", TEACHER_GRID, *self.teacher, log)
                self.teacher_is_recorded = True
            if ema is None:
                self._draw(step, "raw", name, network, self.process, log)
            else:
                self._draw(step, "raw", f"samples_raw{step:06d}.png", network, self.process, log)
                with ema.swapped():
                    self._draw(step, "ema", name, network, self.process, log)

    def _draw(
        self,
        step: int,
        what: str,
        name: str,
        network: DenoisingNetwork,
        process: GaussianDiffusion,
        log: RunLog,
    ) -> None:
        images, _ = sample_images(network, process, self.space, range(self.count), seed=self.seed)
        with log.tolerant():
            save_grid(log.directory / name, images)
            log.picture(step, f"samples/{what}", log.directory / name)
