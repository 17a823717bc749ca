"""Time what ships as it ships: `make bench`.

The commands are run as a user types them, on a throw-away random teacher and pool, and timed by the lines of
their own logs, the first stretch of which does not count. Beside them stand the parts in one process, in turn
with what plain PyTorch would do (`parts.py`), and what the machine itself does. "Of limit" is the arithmetic
done per second over the machine's best in the same number format: a matrix product's or a convolution's.

With --compare REV the distillations of the working tree and of another revision are run in turn instead.
"""

import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch as th
from parts import ITERATION, SAMPLING, TEACHER, Measured, measure, name_of
from shipped import ROOT, STEPS, Shipped, Workload, checkout, save_random_teacher

from guided_diffusion import dist_util
from guided_diffusion.config import command_line
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.networks.precision import compute_dtype
from guided_diffusion.processes.launch import run_script

DIGITS = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
WORKLOADS = [
    Workload(ROOT / "yaml/cifar10_32/exp/CIFAR10-14M-TCCD-0.4.yaml", batch_size=16, stretch=4),
    Workload(DIGITS, batch_size=32, stretch=25),
]
QUICK = Workload(DIGITS, batch_size=4, stretch=1, repeats=1)
COMMANDS = {  # by the part that they repeat
    ITERATION: "image_kd.py, an iteration",
    TEACHER: "dynamic_prepare.py, a step",
    SAMPLING: f"image_sample.py, a step ({STEPS} an image)",
}
EAGER = "plain PyTorch, float32, an iteration"
SAMPLING_STEPS = 50  # of a usual set of samples
median = statistics.median


def command_rates(experiment: DistillationExperiment, workload: Workload) -> dict[str, float]:
    """Images per second of the commands, by the part that they repeat."""
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_of(ROOT, Path(folder), "working tree", experiment, workload)
        rates = {TEACHER: commands.prepare().wall}
        return rates | {ITERATION: commands.distil().wall, SAMPLING: commands.sample().wall}


def commands_of(
    tree: Path, folder: Path, name: str, experiment: DistillationExperiment, workload: Workload
) -> Shipped:
    """The commands of a tree, on the random teacher in `folder`."""
    weights = folder / "teacher.pt"
    if not weights.exists():
        save_random_teacher(experiment, weights)
    timesteps = experiment.teacher.process.diffusion_steps
    return Shipped(tree, folder / name, workload, weights, timesteps)


def print_table(workload: Workload, rates: dict[str, float], found: Measured, dtype: th.dtype) -> None:
    """Print what has been measured; `dtype` is what ships."""
    machine = {name: median(values) / 1e9 for name, values in found.rates.items()}
    limits = {
        kind: max(rate for name, rate in machine.items() if name.endswith(name_of(kind)))
        for kind in (th.float32, dtype)
    }

    def seconds(side: str, part: str) -> float:
        return median(found.times[side, part])

    def row(name: str, images: float, part: str, kind: th.dtype) -> None:
        speed = images * found.flops[part] / workload.batch_size / 1e9
        print(f"{name:40}{images:16.2f}{speed:18.1f}{speed / limits[kind]:10.0%}")

    print(f"{'command, as it is typed':40}{'images/s':>16}{'GFLOP/s':>18}{'of limit':>10}")
    for part, name in COMMANDS.items():
        row(name, rates[part], part, dtype)
    row(EAGER, workload.batch_size / seconds("plain", ITERATION), ITERATION, th.float32)

    titles = f"{'plain':>12}{'shipped':>12}{'ratio':>8}{'GFLOP/s':>10}{'of limit':>10}"
    print(f"{'part, in one process':32}{titles}")
    for part, work in found.flops.items():
        pairs = zip(found.times["plain", part], found.times["shipped", part], strict=True)
        ratio, speed = median(a / b for a, b in pairs), work / seconds("shipped", part) / 1e9
        milliseconds = "".join(f"{1e3 * seconds(side, part):9.1f} ms" for side in ("plain", "shipped"))
        print(f"{part:32}{milliseconds}{ratio:8.2f}{speed:10.1f}{speed / limits[dtype]:10.0%}")
    for name, rate in machine.items():
        print(f"{name:56}{rate:18.1f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}")


def bench(workload: Workload) -> None:
    """Measure one workload and print its table."""
    experiment = load_distillation(workload.config, workload.overrides)
    use_fp16 = experiment.student.architecture.use_fp16
    dtype = compute_dtype(experiment.run.precision, use_fp16, dist_util.dev())
    print(f"\n{workload.config.stem}, batch {workload.batch_size}, {name_of(dtype)}, ", end="")
    print(f"medians of {workload.repeats}, {told_load()}", flush=True)
    rates = command_rates(experiment, workload)
    print_table(workload, rates, measure(experiment, workload.batch_size, workload.repeats, dtype), dtype)
    steps = experiment.teacher.process.diffusion_steps / 2 / experiment.distill.stride
    print(
        f"so an image takes {steps / rates[TEACHER]:.2f} s to prepare ({steps:g} steps) and "
        f"{SAMPLING_STEPS / rates[SAMPLING]:.2f} s to sample ({SAMPLING_STEPS} steps); {told_load()}"
    )


def compare(workload: Workload, revision: str, alternations: int) -> None:
    """Distil by the working tree and by another revision in turn; print rates, and the ratios of pairs."""
    experiment = load_distillation(workload.config, workload.overrides)
    print(f"\n{workload.config.stem}, batch {workload.batch_size}, image_kd.py, images/s, {told_load()}")
    with tempfile.TemporaryDirectory() as folder:
        trees = {"working tree": ROOT, revision: checkout(revision, Path(folder) / "checkout")}
        sides = [
            commands_of(tree, Path(folder), str(k), experiment, workload)
            for k, tree in enumerate(trees.values())
        ]
        titles = "".join(f"{name:>14.14}" for name in (*trees, "ratio", "by processor"))
        print(f"{'':10}{titles}", flush=True)
        for side in sides:
            side.prepare()
        pairs = []
        for k in range(alternations):
            ours, theirs = pair = [side.distil() for side in sides]
            pairs.append(pair)
            ratios = f"{ours.wall / theirs.wall:14.3f}{ours.processor / theirs.processor:14.3f}"
            print(f"{k + 1:<10}{ours.wall:14.2f}{theirs.wall:14.2f}{ratios}", flush=True)
    medians = "".join(f"{median(rate.wall for rate in rates):14.2f}" for rates in zip(*pairs, strict=True))
    print(f"{'median':10}{medians}; {told_load()}")
    for clock in ("wall", "processor"):
        ratios = sorted(getattr(ours, clock) / getattr(theirs, clock) for ours, theirs in pairs)
        print(f"ratio by the {clock}'s clock: {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


def told_load() -> str:
    """How busy the machine is, this program included."""
    return f"load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Parse and measure."""
    parser = command_line.make_bare_parser(__doc__)
    count = command_line.positive
    parser.add_argument("--config", type=Path, help="a distillation (default: CIFAR10-14M and the digits)")
    parser.add_argument("--batch_size", type=count, help="images (default: 16 for CIFAR10-14M, else 32)")
    parser.add_argument("--stretch", type=count, help="iterations that one rate is the mean of")
    parser.add_argument("--repeats", type=count, help="rates that a median is of (default 5)")
    parser.add_argument("--compare", metavar="REV", help="compare with this revision's distillation")
    parser.add_argument("--alternations", type=count, default=5, help="runs of each revision (default 5)")
    parser.add_argument("--quick", action="store_true", help="hardly any iterations; no claims from these")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.precision=bf16")
    args = parser.parse_intermixed_args()
    workloads = [QUICK] if args.quick else WORKLOADS
    if args.config:
        known = [workload for workload in WORKLOADS if workload.config == args.config.resolve()]
        workloads = known or [Workload(args.config)]
    given = {name: getattr(args, name) for name in ("batch_size", "stretch", "repeats")}
    given = {name: value for name, value in given.items() if value} | {"overrides": tuple(args.overrides)}
    dist_util.setup_dist()
    print(f"{dist_util.describe()[0]}, torch {th.__version__}")
    for workload in workloads:
        workload = replace(workload, **given)
        if args.compare:
            compare(workload, args.compare, 1 if args.quick else args.alternations)
        else:
            bench(workload)
    if not args.compare:
        print(f"peak memory, both sides together: {dist_util.peak_memory()}")


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
