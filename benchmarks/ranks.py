"""What averaging the gradients costs among ranks: `mpiexec -n 2 python benchmarks/ranks.py`.

Times whole iterations of the shipped loop, and in them how long a rank waits for the others before it can
average, and how long the averaging then takes.
"""

import os
import statistics
from collections.abc import Iterable

import torch as th
from parts import loop_of, seconds_of
from run import WORKLOADS

from guided_diffusion import dist_util
from guided_diffusion.config import command_line
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.processes.launch import run_script

median = statistics.median


def main() -> None:
    """Measure and print one line for each configuration."""
    parser = command_line.make_bare_parser(__doc__)
    count = command_line.positive
    parser.add_argument(
        "--batch_size", type=count, help="of all ranks (default: 16 for CIFAR10-14M, else 32)"
    )
    parser.add_argument("--iterations", type=count, default=10, help="after one warm-up (default 10)")
    args = parser.parse_args()
    launch = dist_util.setup_dist()
    average = dist_util.average_gradients
    spent: dict[str, list[float]] = {"whole": [], "waiting": [], "averaging": []}

    def timed(parameters: Iterable[th.nn.Parameter]) -> None:
        spent["waiting"].append(seconds_of(dist_util.barrier))
        spent["averaging"].append(seconds_of(lambda: average(parameters)))

    dist_util.average_gradients = timed
    threads = dist_util.describe()
    if launch.rank == 0:
        print(*threads, f"load {os.getloadavg()[0]:.1f}", sep="\n")
    for workload in WORKLOADS:
        experiment = load_distillation(workload.config)
        size = args.batch_size or workload.batch_size
        share = command_line.per_rank(size, launch.world_size, "--batch_size")
        loop = loop_of(experiment, share, experiment.run)
        for values in spent.values():
            values.clear()
        for _ in range(args.iterations + 1):
            spent["whole"].append(
                seconds_of(lambda loop=loop: loop.train_step(loop.source.next_batch(loop.step)))
            )
        whole, waiting, averaging = (median(values[1:]) for values in spent.values())
        if launch.rank == 0:
            millions = sum(parameter.numel() for parameter in loop.parameters) / 1e6
            print(
                f"{workload.config.stem}, batch {size}: an iteration {1e3 * whole:.0f} ms, averaging "
                f"{millions:.1f}M gradients {1e3 * averaging:.1f} ms ({averaging / whole:.1%}), waiting for "
                f"the other ranks {1e3 * waiting:.1f} ms ({waiting / whole:.1%})",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
