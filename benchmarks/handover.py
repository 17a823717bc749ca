"""Where along the chain does a student lose its teacher's distribution?

Samples the same noise several times: by the teacher alone, by the student alone, and by the teacher down to
a step t below which the student goes on. If handing over at t makes the samples as good as the teacher's,
the student's errors below t do no harm; what is lost must be lost above. Prints the score of each against
the real images, and against the teacher's own samples of the same noise.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from evaluations.evaluation import evaluate_files
from evaluations.results import values
from evaluations.settings import Settings
from guided_diffusion import dist_util
from guided_diffusion.config.command_line import input_file, positive
from guided_diffusion.config.loading import find_config, load_distillation
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path
from guided_diffusion.networks.base import DenoisingNetwork
from guided_diffusion.networks.precision import place
from guided_diffusion.processes.launch import run_script
from guided_diffusion.runs.checkpoint import load_network
from guided_diffusion.sampling.samplers import sample_images
from guided_diffusion.script_util import build_network, build_process
from guided_diffusion.setups.distillation import load_teacher
from guided_diffusion.spaces import PixelSpace


class Handover(nn.Module):
    """One network down to a step, another below it.

    Args:
        first, then: of the same inputs and outputs.
        step: the last t, of the network's own timesteps, that is the first's; T and more: `then` alone.
    """

    def __init__(self, first: DenoisingNetwork, then: DenoisingNetwork, step: float):
        super().__init__()
        self.first, self.then, self.step = first, then, step
        self.shape, self.num_classes = first.shape, first.num_classes

    def forward(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """The output of the one whose turn it is; t [B], all equal."""
        return (self.first if float(t[0]) >= self.step else self.then)(x, t, y)


def main() -> None:
    """Sample and score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=find_config, required=True, help="the distillation's")
    parser.add_argument("--model_path", type=Path, required=True, help="the student's weights")
    parser.add_argument("--reference", type=Path, required=True, help="npz of real images")
    parser.add_argument("--backend", default="digits", choices=("digits", "torch", "tensorflow"))
    parser.add_argument("--steps", type=float, nargs="+", default=[950, 700, 300], help="t to hand over at")
    parser.add_argument("--num_samples", type=positive, default=2000)
    parser.add_argument("--batch_size", type=positive, default=250)
    parser.add_argument("--timestep_respacing", default="50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    dist_util.setup_dist()
    experiment = load_distillation(args.config, args.overrides)
    if experiment.student.process != experiment.teacher.process:
        raise UserError("the student's diffusion must be the teacher's")
    teacher = load_teacher(
        experiment, Path(input_file(experiment.teacher.model_path, args.config, "teacher.model_path"))
    ).network
    student, process = build_network(experiment.student, "student.")
    load_network(student, args.model_path)
    place(student.eval(), experiment.student.architecture.use_fp16, experiment.run, frozen=True)
    last = process.num_timesteps
    process = build_process(experiment.student, "--timestep_respacing", args.timestep_respacing)
    chains = {"teacher": 0.0} | {f"teacher, student below {t:g}": t for t in args.steps} | {"student": last}
    settings = Settings(backend=args.backend)
    print(f"{'':28}{'score':>8}{'to the teacher':>16}")
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for name, step in chains.items():
            network = Handover(teacher, student, step)
            parts = [
                sample_images(network, process, PixelSpace(teacher.shape[-1]), rows, seed=args.seed)[0]  # type: ignore[arg-type]
                for rows in np.array_split(
                    np.arange(args.num_samples), -(-args.num_samples // args.batch_size)
                )
            ]
            paths.append(Path(folder) / f"{len(paths)}.npz")
            with atomic_path(paths[-1]) as temporary, open(temporary, "wb") as file:
                np.savez(file, np.concatenate(parts))
            found = [
                values(next(evaluate_files(reference, [paths[-1]], settings)))
                for reference in (args.reference, paths[0])
            ]
            score, own = (next(v[key] for key in ("fd", "fid") if key in v) for v in found)
            print(f"{name:28}{score:8.3f}{own:16.3f}", flush=True)


if __name__ == "__main__":
    run_script(main)
