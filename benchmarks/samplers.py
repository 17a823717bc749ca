"""How many network evaluations does each sampler need? digits-FD of the embedded teacher's samples.

Draws a set of images with every sampler at every number of steps and with every seed, as `image_sample.py`
does, scores each against the real digits, and prints one table: the mean digits-FD over the seeds, and beside
it half the range of them. What has been drawn is reused, so the command continues where it was stopped.
"""

from pathlib import Path
from statistics import mean

import torch as th

from evaluations.digits_floor import real_floor
from evaluations.evaluator import evaluate
from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.registry import SAMPLERS, look_up
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.npz_writer import create_npz
from guided_diffusion.processes.launch import run_script
from guided_diffusion.runs.weights import load_network
from guided_diffusion.sampling.sample_set import SampleSet
from guided_diffusion.script_util import build_network, build_process, build_space

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "yaml/digits_16/teacher.yaml"
WEIGHTS = ROOT / "model/digits_teacher.pt"
BATCH_SIZE = 125
COLUMNS = {  # name: sampler, timestep_respacing of N steps
    "ancestral": ("ancestral", "{}"),
    "ddim": ("ddim", "{}"),
    "ddim-trailing": ("ddim", "trailing{}"),
    "dpmpp_2m": ("dpmpp_2m", "trailing{}"),
    "unipc": ("unipc", "trailing{}"),
}
DEFAULT = ["ancestral", "ddim", "dpmpp_2m", "unipc"]


class Benchmark:
    """Scores of the teacher's samples; everything drawn lies in a folder.

    Args:
        folder: holds a set of samples for each setting, and the real digits.
        num_samples: images in a set.
    """

    def __init__(self, folder: Path, num_samples: int):
        self.folder, self.num_samples = folder, num_samples
        self.settings = load_experiment(CONFIG, []).student
        self.model, _ = build_network(self.settings)
        load_network(self.model, WEIGHTS)
        self.model.eval()
        self.reference = folder / "digits.npz"
        images, labels = load_digit_images()
        with create_npz(self.reference, len(images)) as writer:
            writer.append(images, labels)

    def score(self, sampler: str, respacing: str, seed: int) -> float:
        """The digits-FD of one set, drawn now if it is not there yet."""
        process = build_process(self.settings, "respacing", respacing)
        samples = SampleSet(
            self.folder / f"{sampler}-{respacing}-seed{seed}-{self.num_samples}",
            self.num_samples,
            seed=seed,
            sampler=(sampler, look_up(SAMPLERS, sampler, "--samplers")),
            clip_denoised=True,
        )
        path = samples.draw(self.model, process, build_space(self.settings), WEIGHTS, BATCH_SIZE)
        return evaluate(self.reference, path, backend="digits", use_cache=False).fd


def table(scores: dict[tuple[str, int], list[float]], columns: list[str], steps: list[int]) -> str:
    """Mean and half range over the seeds, a row for each number of steps."""
    lines = [f"{'steps':>5}" + "".join(f"{name:>16}" for name in columns)]
    for n in steps:
        cells = []
        for name in columns:
            values = scores[name, n]
            spread = f" +-{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"{n:5}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15, 20, 30, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--samplers", nargs="+", choices=COLUMNS, default=DEFAULT, metavar="S",
                        help=f"of {', '.join(COLUMNS)}; default: all but ddim-trailing")  # fmt: skip
    parser.add_argument(
        "--reference_steps", type=int, default=50, help="ancestral steps to match (default 50)"
    )
    parser.add_argument("--num_samples", type=int, default=1000, help="images in a set (default 1000)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "experiments/samplers", help="the samples' home"
    )
    parser.add_argument(
        "--quick", action="store_true", help="200 images, 5 and 10 steps, seed 0, against 10 ancestral"
    )
    args = parser.parse_args()
    if args.quick:
        args.num_samples, args.steps, args.seeds, args.reference_steps = 200, [5, 10], [0], 10

    benchmark = Benchmark(args.folder, args.num_samples)
    floor = real_floor(benchmark.reference, args.num_samples)
    print(f"digits-FD of {args.num_samples} images, seeds {args.seeds}; torch {th.__version__}")
    print(f"real digits (floor): {floor.fd:.2f} +-{floor.fd_std:.2f}")

    def measure(column: str, n: int) -> list[float]:
        sampler, respacing = COLUMNS[column]
        values = [benchmark.score(sampler, respacing.format(n), seed) for seed in args.seeds]
        print(f"  {column} {n}: {' '.join(f'{value:.3f}' for value in values)}", flush=True)
        return values

    reference = measure("ancestral", args.reference_steps)
    scores = {(column, n): measure(column, n) for column in args.samplers for n in args.steps}
    print("\n" + table(scores, args.samplers, args.steps))
    for column in args.samplers:
        matching = [n for n in args.steps if mean(scores[column, n]) <= max(reference)]
        verdict = f"from {min(matching)} steps" if matching else "at none of these numbers of steps"
        print(f"{column} matches {args.reference_steps} ancestral steps (their worst seed) {verdict}")


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
