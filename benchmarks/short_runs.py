"""Short distillations of the embedded digits teacher, for the benchmarks that vary one thing in them."""

from pathlib import Path

import torch as th

from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.distill.dynamic_batch import DynamicBatch, pool_size, prepare
from guided_diffusion.distill.pool_file import write_pool
from guided_diffusion.logger import RunLog
from guided_diffusion.networks.base import DenoisingNetwork
from guided_diffusion.setups.distillation import distillation_loop, load_teacher
from guided_diffusion.setups.pools import noise_pool, pool_identity
from guided_diffusion.train_util import TrainLoop, reseed

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
WEIGHTS = ROOT / "model/digits_teacher.pt"
ROWS_PER_CALL = 128

# The demo's method when low_precision.py and strided.py were measured.
BEFORE_HOPS = [
    "distill.advance_stride=1",
    "distill.loss_weight=eps",
    "distill.teacher_interval=1",
    "distill.stride=20",
    "distill.stage1_fraction=1",
    "distill.stage2_fraction=1",
    "distill.initial_weights=random",
    "distill.bottleneck_weight=0",
    "run.optimizer=adamw",
    "student.lr=3e-3",
    "run.warmup_steps=100",
]


def demo(iterations: int, seed: int, *overrides: str) -> DistillationExperiment:
    """The demo's distillation at another length, without sampled grids."""
    return load_distillation(CONFIG, [
        f"run.iterations={iterations}", f"student.lr_anneal_steps={iterations}", f"run.seed={seed}",
        "run.sample_interval=-1", *overrides,
    ])  # fmt: skip


class ShortRuns:
    """The teacher, and states on which students are compared with it.

    Args:
        held_out: number of those states, made by the full chain and held by no pool.

    Attributes:
        teacher: in float32.
        x, t: the states, float32 [held_out, 3, H, W] and int64 [held_out].
        target: the teacher's eps there.
    """

    def __init__(self, held_out: int):
        self.teacher = load_teacher(demo(1, 0), WEIGHTS)
        states = self.prepared(held_out, stride=1, seed=99)
        self.x, self.t = states.x, states.levels - 1
        self.target = self.teacher.step(self.x, self.t).eps

    def prepared(self, size: int, stride: int, seed: int) -> DynamicBatch:
        """A prepared pool."""
        reseed(seed, 0, 0)
        pool = noise_pool(self.teacher, size)
        for _ in prepare(pool, self.teacher, ROWS_PER_CALL, stride):
            pass
        return pool

    def pool_size(self, experiment: DistillationExperiment) -> int:
        """Samples in the pool that an experiment asks for."""
        teacher, batch_size = experiment.teacher, experiment.student.training.batch_size
        return pool_size(teacher.iter_choice, teacher.BATCH, self.teacher.process.num_timesteps, batch_size)

    def distil(
        self, experiment: DistillationExperiment, pool: DynamicBatch, folder: Path, *, record: bool
    ) -> TrainLoop:
        """Distil from a pool in a folder, with or without a record; the loop after its last iteration."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "pool.cache"
        write_pool(path, [pool], pool_identity(experiment, WEIGHTS, self.pool_size(experiment)))
        loop = distillation_loop(
            experiment,
            weights=WEIGHTS,
            pool_path=path,
            batch_size=experiment.student.training.batch_size,
            log=RunLog(folder, active=record),
        )
        loop.run()
        return loop

    @th.no_grad()
    def error(self, network: DenoisingNetwork) -> float:
        """A network's mean squared difference from the teacher's float32 predictions, held out."""
        eps = network.eval()(self.x, self.t)[:, : self.x.shape[1]]
        return float((eps - self.target).square().mean())
