"""Time one TCCD iteration part by part: `make bench`, or python benchmarks/run.py --help.

Prints medians over repetitions taken in turn, so that a machine whose speed drifts slows all parts alike,
the arithmetic each part did per second, and what a plain matrix product does on the same machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch as th
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.config import load_experiment
from guided_diffusion.dynamic_batch import DynamicBatch
from guided_diffusion.objectives import Distillation
from guided_diffusion.script_util import build_network
from guided_diffusion.settings import Distill, Experiment

ROOT = Path(__file__).resolve().parent.parent


def seconds_of(function: Callable[[], object], device: th.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    if device.type == "cuda":
        th.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        th.cuda.synchronize()
    return time.perf_counter() - started


def flops_of(function: Callable[[], object]) -> float:
    """Floating-point operations of one call's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def parts_of(experiment: Experiment, batch_size: int, device: th.device) -> dict[str, Callable[[], object]]:
    """The parts of an iteration, each ready to be called again and again."""
    assert experiment.teacher is not None
    th.manual_seed(0)
    teacher, diffusion = build_network(experiment.teacher)
    teacher.to(device).eval().requires_grad_(False)
    student, _ = build_network(experiment.student)
    objective = Distillation(student, diffusion, Distill())
    student.to(device).train()
    objective.to(device)
    pool = DynamicBatch.of_noise(batch_size, student.image_size, diffusion.num_timesteps, device=device)
    pool.levels = th.randint(1, diffusion.num_timesteps, (batch_size,), device=device)
    optimizer = th.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-6)
    batch = pool.next_batch(batch_size, teacher, diffusion)

    def iteration() -> None:
        optimizer.zero_grad(set_to_none=True)
        for out in objective.passes(student, pool.next_batch(batch_size, teacher, diffusion)):
            out.loss.mean().backward()
        optimizer.step()

    return {
        "teacher step": lambda: pool.next_batch(batch_size, teacher, diffusion),
        "stage 1, forward and backward": lambda: objective.stage1(student, batch).loss.mean().backward(),
        "stage 2, forward and backward": lambda: objective.stage2(student, batch).loss.mean().backward(),
        "whole iteration": iteration,
    }


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
    parser.add_argument(
        "--config", type=Path, default=default, help="the distillation (default: digits-TCCD)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="samples (default 32)")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions after one warm-up (default 7)")
    args = parser.parse_args()
    device = th.device("cuda" if th.cuda.is_available() else "cpu")
    parts = parts_of(load_experiment(args.config), args.batch_size, device)
    a = th.randn(2048, 2048, device=device)
    parts["matrix product 2048^3"] = lambda: a @ a

    flops = {name: flops_of(function) for name, function in parts.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, function in parts.items():
            times[name].append(seconds_of(function, device))
    print(f"{args.config.stem}, batch {args.batch_size}, float32, {device}, torch {th.__version__}, ", end="")
    print(f"{th.get_num_threads()} threads; medians of {args.repeats}")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:32}{1e3 * median:10.1f} ms{flops[name] / median / 1e9:10.1f} GFLOP/s")


if __name__ == "__main__":
    main()
