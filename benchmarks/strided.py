"""Does the strided preparation cost the student anything? Full chain against strides, same everything else.

Prepares a pool with each stride, distils a student from each with each seed, and prints the preparation's
processor seconds and the student's held-out error: its mean squared difference from the teacher's noise
prediction on teacher states that no pool holds, made by the full chain.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch as th

from guided_diffusion.config import load_experiment
from guided_diffusion.distill_setup import distillation_loop, load_teacher, pool_identity
from guided_diffusion.dynamic_batch import DynamicBatch, prepare, teacher_step
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.logger import RunLog
from guided_diffusion.pool_file import write_pool
from guided_diffusion.settings import Experiment
from guided_diffusion.train_util import reseed
from guided_diffusion.unet import UNetModel

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
ROWS_PER_CALL = 128


def load(stride: int, seed: int, iterations: int, rho: float) -> Experiment:
    """The demo's distillation with another pool and length."""
    return load_experiment(
        CONFIG,
        [
            *(f"teacher.BATCH={rho}", f"distill.stride={stride}", f"run.seed={seed}"),
            *(
                f"run.iterations={iterations}",
                f"student.lr_anneal_steps={iterations}",
                "run.sample_interval=-1",
            ),
        ],
    )


def prepared(
    teacher: UNetModel, diffusion: GaussianDiffusion, size: int, stride: int, seed: int
) -> tuple[DynamicBatch, float]:
    """A prepared pool, and the processor seconds it took."""
    reseed(seed, 0, 0)
    pool = DynamicBatch.of_noise(size, teacher.image_size, diffusion.num_timesteps)
    started = time.process_time()
    for _ in prepare(pool, teacher, diffusion, ROWS_PER_CALL, stride):
        pass
    return pool, time.process_time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strides", type=int, nargs="+", default=[20, 1], help="default 20 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--iterations", type=int, default=600, help="default 600")
    parser.add_argument(
        "--rho", type=float, default=0.015, help="the pool holds rho T batches (default 0.015)"
    )
    parser.add_argument("--held_out", type=int, default=96, help="held-out states (default 96)")
    args = parser.parse_args()
    first = load(1, 0, args.iterations, args.rho)
    assert first.teacher is not None
    weights = ROOT / first.teacher.model_path
    teacher, diffusion = load_teacher(first, weights)
    held_out, _ = prepared(teacher, diffusion, args.held_out, 1, seed=99)
    t = held_out.levels - 1
    target = teacher_step(teacher, diffusion, held_out.x, t).eps
    size = round(args.rho * diffusion.num_timesteps) * first.student.batch_size
    for stride in args.strides:
        pool, seconds = prepared(teacher, diffusion, size, stride, seed=0)
        print(f"stride {stride}: {size} samples prepared in {seconds:.0f} processor seconds", flush=True)
        for seed in args.seeds:
            experiment = load(stride, seed, args.iterations, args.rho)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "pool.cache"
                write_pool(path, [pool], pool_identity(experiment, weights, size))
                loop = distillation_loop(
                    experiment,
                    weights=weights,
                    pool_path=path,
                    batch_size=experiment.student.batch_size,
                    log=RunLog(Path(folder), active=False),
                )
                loop.run()
            next(iter(loop.emas.values())).swap()
            with th.no_grad():
                eps = loop.model.eval()(held_out.x, t)[:, :3]
            error = float((eps - target).square().mean())
            print(f"  seed {seed}: held-out error {error:.4f} after {args.iterations} iterations", flush=True)


if __name__ == "__main__":
    main()
