"""Where along the chain does a student lose its teacher's distribution?

Samples the same noise several times: by the teacher alone, by the student alone, and by the teacher down to
a step t below which the student goes on. If handing over at t makes the samples as good as the teacher's,
the student's errors below t do no harm; what is lost must be lost above. Prints the score of each against
the real images, and against the teacher's own samples of the same noise.

--exact adds the denoiser that is exact for the real images themselves, the mean of q(x_0 | x_t) over them:
chains whose eps is its at first, and how far each network's eps is from its own. It takes data and is no goal
(below some t it knows the images by heart), but where all is noise it tells a network's error from what
cannot be known.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from evaluations.evaluation import evaluate_files
from evaluations.results import values
from evaluations.settings import Settings
from guided_diffusion import dist_util
from guided_diffusion.config.command_line import make_bare_parser, positive
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.paths import find_config, input_file
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.image_sets import open_images
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.networks.base import DenoisingNetwork
from guided_diffusion.networks.precision import place
from guided_diffusion.processes.launch import run_script
from guided_diffusion.runs.weights import load_network
from guided_diffusion.sampling.samplers import sample_images
from guided_diffusion.script_util import build_network, build_process
from guided_diffusion.setups.distillation import load_teacher


class Handover(nn.Module):
    """One network down to a step, another below it.

    Args:
        first, then: of the same inputs and outputs.
        step: the last t, of the network's own timesteps, that is the first's; T and more: `then` alone.
    """

    def __init__(self, first: nn.Module, then: nn.Module, step: float):
        super().__init__()
        self.first, self.then, self.step = first, then, step
        self.shape, self.num_classes = then.shape, then.num_classes

    def forward(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """The output of the one whose turn it is; t [B], all equal."""
        return (self.first if float(t[0]) >= self.step else self.then)(x, t, y)


class AsEps(nn.Module):
    """A network whose first C channels are eps, whatever it predicts itself.

    Args:
        network: without classes.
        process: its process, not respaced.
    """

    num_classes = None

    def __init__(self, network: DenoisingNetwork, process: GaussianDiffusion):
        super().__init__()
        self.network, self.process, self.shape = network, process, network.shape

    def forward(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """[B, C or 2C, H, W] of x [B, C, H, W] and the network's own timesteps [B]."""
        output = self.network(x, t, y)
        eps = self.process.eps_of(output, x, steps_of(self.process, t))
        return th.cat([eps, output[:, x.shape[1] :]], 1)


class ExactDenoiser(nn.Module):
    """eps of the mean of q(x_0 | x_t), x_0 one of the given images; a learned variance is a network's.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
        network: whose variance it has.
    """

    num_classes = None

    def __init__(self, images: th.Tensor, network: AsEps):
        super().__init__()
        self.images, self.network, self.shape = images.flatten(1), network, images.shape[1:]

    def eps(self, x: th.Tensor, t: th.Tensor) -> th.Tensor:
        """The noise [B, C, H, W] in x [B, C, H, W] at steps t [B]."""
        process = self.network.process
        signal = process.at("sqrt_alphas_cumprod", t).flatten(1)
        squares = (self.images**2).sum(1)
        likelihood = (signal * (x.flatten(1) @ self.images.T) - signal**2 * squares / 2) / (1 - signal**2)
        return process.predict_eps_from_xstart(x, t, (likelihood.softmax(1) @ self.images).view_as(x))

    def forward(self, x: th.Tensor, t: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """[B, C or 2C, H, W] of x [B, C, H, W] and a network's timesteps [B]."""
        variance = self.network(x, t)[:, x.shape[1] :]
        return th.cat([self.eps(x, steps_of(self.network.process, t)), variance], 1)


def steps_of(process: GaussianDiffusion, t: th.Tensor) -> th.Tensor:
    """The steps int64 [B] of a process that is not respaced, for its network's timesteps."""
    scale = process.original_num_steps / 1000.0 if process.rescale_timesteps else 1.0
    return (t * scale).round().long()


def print_errors(exact: ExactDenoiser, networks: dict[str, AsEps], seed: int) -> None:
    """Mean squared distances from the exact eps, of 256 noisy images in each tenth of 0..T-1."""
    th.manual_seed(seed)
    process = exact.network.process
    count, parts, last = 256, 10, process.num_timesteps
    print(f"\n{'eps, from the exact one':28}" + "".join(f"{name:>16}" for name in networks))
    for part in range(parts):
        low, high = part * last // parts, (part + 1) * last // parts
        t = th.randint(low, high, (count,)).to(exact.images.device)
        images = exact.images[th.randint(len(exact.images), (count,))].view(count, *exact.shape)
        x = process.q_sample(images, t)
        eps, timesteps = exact.eps(x, t), process.model_timesteps(t)
        errors = [
            float(((net(x, timesteps)[:, : x.shape[1]] - eps) ** 2).mean()) for net in networks.values()
        ]
        print(f"{f't in {low}..{high - 1}':28}" + "".join(f"{error:16.5f}" for error in errors), flush=True)


@th.no_grad()
def main() -> None:
    """Sample and score."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--config", type=find_config, required=True, help="the distillation's")
    parser.add_argument("--model_path", type=Path, required=True, help="the student's weights")
    parser.add_argument("--reference", type=Path, required=True, help="npz of real images")
    parser.add_argument("--backend", default="digits", choices=("digits", "torch", "tensorflow"))
    parser.add_argument("--steps", type=float, nargs="+", default=[950, 700, 300], help="t to hand over at")
    parser.add_argument("--num_samples", type=positive, default=2000)
    parser.add_argument("--batch_size", type=positive, default=250)
    parser.add_argument("--timestep_respacing", default="50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="the exact denoiser of the reference too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    dist_util.setup_dist()
    experiment = load_distillation(args.config, args.overrides)
    loaded = load_teacher(
        experiment, Path(input_file(experiment.teacher.model_path, args.config, "teacher.model_path"))
    )
    network, process = build_network(experiment.student, "student.")
    as_teachers = {"prediction_type": experiment.teacher.process.prediction_type}
    if dataclasses.replace(experiment.student.process, **as_teachers) != (
        dataclasses.replace(experiment.teacher.process, **as_teachers)
    ):
        raise UserError("the student's diffusion must be the teacher's, but for what it predicts")
    if network.num_classes is not None:
        raise UserError("networks with classes cannot be compared here")
    load_network(network, args.model_path)
    place(network.eval(), experiment.student.architecture.use_fp16, experiment.run, frozen=True)
    networks = {"teacher": AsEps(loaded.network, loaded.process), "student": AsEps(network, process)}
    teacher, student = networks.values()
    chains = {"teacher": Handover(teacher, teacher, 0)}
    chains |= {f"teacher, student below {t:g}": Handover(teacher, student, t) for t in args.steps}
    chains |= {"student": Handover(student, student, 0)}
    space, exact = loaded.space, {}
    if args.exact:
        images = open_images(NpzFile(args.reference), at_least=1, sizes=[teacher.shape[-1]])
        real = space.encode(th.from_numpy(np.concatenate(list(images.batches(1000))))).to(dist_util.dev())
        exact = {name: ExactDenoiser(real, net) for name, net in networks.items()}
    chains |= {
        f"exact, {name} below {t:g}": Handover(exact[name], networks[name], t)
        for name in exact
        for t in args.steps
    }
    eps = dataclasses.replace(experiment.teacher.process, prediction_type="epsilon")
    sampled = dataclasses.replace(experiment.teacher, process=eps)
    process = build_process(sampled, "--timestep_respacing", args.timestep_respacing)
    settings = Settings(backend=args.backend)
    print(f"{'':28}{'score':>8}{'to the teacher':>16}")
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for name, chain in chains.items():
            parts = [
                sample_images(chain, process, space, rows, seed=args.seed)[0]  # type: ignore[arg-type]
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
    if exact:
        print_errors(exact["teacher"], networks, args.seed)


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
