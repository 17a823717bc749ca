"""Does the strided preparation cost the student anything? Full chain against strides, same everything else.

Prepares a pool with each stride, distils a student from each with each seed, and prints the preparation's
processor seconds and the student's held-out error: its mean squared difference from the teacher's noise
prediction on teacher states that no pool holds, made by the full chain.
"""

import tempfile
import time
from pathlib import Path

from short_runs import BEFORE_HOPS, ShortRuns, demo

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Measure and print."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--strides", type=int, nargs="+", default=[20, 1], help="default 20 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--iterations", type=int, default=600, help="default 600")
    parser.add_argument(
        "--rho", type=float, default=0.015, help="the pool holds rho T batches (default 0.015)"
    )
    parser.add_argument("--held_out", type=int, default=96, help="held-out states (default 96)")
    args = parser.parse_args()
    runs = ShortRuns(args.held_out)
    for stride in args.strides:
        overrides = *BEFORE_HOPS, f"teacher.BATCH={args.rho}", f"distill.stride={stride}"
        size = runs.pool_size(demo(args.iterations, 0, *overrides))
        started = time.process_time()
        pool = runs.prepared(size, stride, seed=0)
        seconds = time.process_time() - started
        print(f"stride {stride}: {size} samples prepared in {seconds:.0f} processor seconds", flush=True)
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                experiment = demo(args.iterations, seed, *overrides)
                loop = runs.distil(experiment, pool, Path(folder), record=False)
            next(iter(loop.emas.values())).swap()
            error = runs.error(loop.network)
            print(f"  seed {seed}: held-out error {error:.4f} after {args.iterations} iterations", flush=True)


if __name__ == "__main__":
    run_script(main)
