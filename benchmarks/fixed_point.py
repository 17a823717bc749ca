"""Does stage 2 teach a student to hand noise back? Four students, and what each makes of the teacher's noise.

Stage 2 as published shows the student the teacher's noise prediction eps_T at the timestep t and asks for
eps_T itself, so that noise becomes a fixed point at every t, also where x_t is nearly clean. This distils
four students from one pool with one seed: without stage 2, as published, with the role vector, and between
t and T. It prints for each the mean squared difference of its answer to (eps_T, t) from eps_T (0: a fixed
point), its error on real states (x_t, t), and how far the latter draws it to its input; and draws the first
over t, beside samples.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch as th
from short_runs import ROOT, ShortRuns, demo

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.files import atomic_path
from guided_diffusion.networks.base import DenoisingNetwork
from guided_diffusion.processes.launch import run_script
from guided_diffusion.sampling.samplers import sample_images
from guided_diffusion.script_util import build_process
from guided_diffusion.spaces import PixelSpace

BASE = (
    *("distill.stage1_weight=0", "distill.initial_weights=random", "distill.bottleneck_weight=0"),
    *("run.optimizer=adamw", "student.lr=3e-3"),
)
STUDENTS = {
    "without stage 2": ("distill.stage2_weight=0",),
    "as published": ("distill.role_vector=false", "distill.stage2_fraction=1"),
    "role vector": ("distill.role_vector=true", "distill.stage2_fraction=1"),
    "between t and T": (
        *("distill.role_vector=false", "distill.stage2_time=between", "distill.stage2_fraction=1"),
    ),
}
BINS = 10
SHOWN = 16  # samples


class Answers:
    """What a network makes of the teacher's noise predictions and of its states, by tenths of T.

    Attributes:
        handed_back: mean squared difference of the answer to (eps_T, t) from eps_T, [BINS].
        error: that of the answer to (x_t, t), over all t.
        drawn: the share of x_t - eps_T that is in the error there, least squares.
    """

    def __init__(self, network: DenoisingNetwork, process: GaussianDiffusion, runs: ShortRuns):
        def eps(x: th.Tensor) -> th.Tensor:
            return process.eps_of(network(x, process.model_timesteps(runs.t)), x, runs.t)

        with th.no_grad():
            network.eval()
            bins = BINS * runs.t // process.num_timesteps
            back = (eps(runs.target) - runs.target).square().mean(dim=(1, 2, 3))
            self.handed_back = [float(back[bins == number].mean()) for number in range(BINS)]
            error, away = eps(runs.x) - runs.target, runs.x - runs.target
            self.error = float(error.square().mean())
            self.drawn = float((error * away).sum() / away.square().sum())


def main() -> None:
    """Distil, measure, print and draw."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--iterations", type=int, default=650, help="of each student (default 650)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rho", type=float, default=0.05, help="the pool holds rho T batches (default 0.05)")
    parser.add_argument("--held_out", type=int, default=512, help="states to ask at (default 512)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/study/fixed-point.png")
    args = parser.parse_args()
    runs = ShortRuns(args.held_out)
    settings = (*BASE, f"teacher.BATCH={args.rho}")
    experiment = demo(args.iterations, args.seed, *settings)
    pool = runs.prepared(runs.pool_size(experiment), experiment.distill.stride, args.seed)
    steps = build_process(experiment.student, "respacing", "50")
    found = {"teacher": Answers(runs.teacher.network, runs.teacher.process, runs)}
    pictures = {}
    print(f"{'':18}{'handed back':>12}{'  in the cleanest tenth':>23}{'error':>9}{'drawn to x_t':>14}")
    for name in ("teacher", *STUDENTS):
        if name != "teacher":
            experiment = demo(args.iterations, args.seed, *settings, *STUDENTS[name])
            with tempfile.TemporaryDirectory() as folder:
                loop = runs.distil(experiment, pool, Path(folder), record=False)
            next(iter(loop.emas.values())).swap()
            found[name] = Answers(loop.network, loop.process, runs)
            space = PixelSpace(16)
            pictures[name], _ = sample_images(loop.network, steps, space, range(SHOWN), seed=args.seed)
        of = found[name]
        back = f"{np.nanmean(of.handed_back):12.4f}{of.handed_back[0]:23.4f}"
        print(f"{name:18}{back}{of.error:9.4f}{of.drawn:14.4f}", flush=True)
    draw(args.picture, found, pictures)


def draw(path: Path, found: dict[str, Answers], pictures: dict[str, np.ndarray]) -> None:
    """Draw what is handed back over t, and samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[2.4, 0.05, 1, 1])
    axes = figure.add_subplot(grid[:, 0])
    t = (np.arange(BINS) + 0.5) / BINS
    for number, (name, answers) in enumerate(found.items()):
        axes.plot(
            t,
            answers.handed_back,
            marker="o",
            ms=4,
            color="k" if not number else f"C{number - 1}",
            label=name,
        )
    axes.set(
        yscale="log", xlabel="t / T (0: clean, 1: noise)", ylabel="mean squared (answer to eps_T) - eps_T"
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    for number, (name, images) in enumerate(pictures.items()):
        part = figure.add_subplot(grid[number // 2, 2 + number % 2])
        side = images.shape[1]
        part.imshow(
            images.reshape(4, 4, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(4 * side, 4 * side, 3)
        )
        part.set_title(name, fontsize=9)
        part.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    run_script(main)
