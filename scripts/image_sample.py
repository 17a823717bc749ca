"""Sample images from a trained model, into samples_NxHxWx3.npz (uint8, arr_0; labels in arr_1)."""

from argparse import ArgumentParser

from guided_diffusion.config import command_line, paths
from guided_diffusion.config.loading import experiment_keys, load_experiment
from guided_diffusion.config.registry import SAMPLERS, look_up, require_known
from guided_diffusion.config.settings import dotted
from guided_diffusion.errors import UserError
from guided_diffusion.processes.launch import run_script


def choose_sampler(sampler: str | None, use_ddim: bool | None) -> str:
    """The sampler that --sampler and guided-diffusion's --use_ddim name together; None where not given.

    Raises:
        UserError: they contradict each other.
    """
    if use_ddim and sampler not in (None, "ddim"):
        raise UserError(
            f"--use_ddim True means --sampler ddim, but --sampler {sampler} is given: leave one out"
        )
    if use_ddim is False and sampler == "ddim":
        raise UserError("--sampler ddim contradicts --use_ddim False: leave one out")
    return "ddim" if use_ddim else sampler or "ancestral"


def make_parser() -> ArgumentParser:
    """What the command takes."""
    parser = command_line.make_parser(__doc__, ["student", "run"], "what the checkpoint says of itself")
    parser.add_argument(
        "--model_path",
        required=True,
        help="the checkpoint: model* or ema_*, .pt, .safetensors or .ckpt; or a run's best.json",
    )
    parser.add_argument(
        "--batch_size", type=command_line.positive, default=16, help="images at a time and rank (default 16)"
    )
    parser.add_argument(
        "--num_samples", type=command_line.positive, default=10000, help="images (default 10000)"
    )
    parser.add_argument(
        "--timestep_respacing", help="steps: 50, ddim50, ... (default: the configuration's, or all)"
    )
    parser.add_argument(
        "--sampler",
        help=f"{', '.join(SAMPLERS)}, or package.module:Name; see docs/sampling.md (default ancestral)",
    )
    parser.add_argument("--use_ddim", type=command_line.boolean, help="True: the same as --sampler ddim")
    parser.add_argument(
        "--clip_denoised",
        type=command_line.boolean,
        default=True,
        help="clip the predicted x_0 as clip_denoised of the configuration says (default), or never",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=0.0,
        help="classifier-free guidance: eps(null class) + W (eps(y) - eps(null class)) (default 0: off)",
    )
    parser.add_argument("--name", help="folder under experiments/sample (default: from CONFIG and MODEL)")
    parser.add_argument("--log_dir", help="write here, a path or a URL, instead of experiments/sample/NAME")
    return parser


def main() -> None:
    """Parse, build, run."""
    args = make_parser().parse_intermixed_args()
    experiment = load_experiment(args.config, args.overrides) if args.config else None
    name = choose_sampler(args.sampler, args.use_ddim)
    require_known(SAMPLERS, name, "--sampler")

    from pathlib import Path

    config = args.config or Path(args.model_path)
    weights_name = paths.input_file(args.model_path, config, "--model_path")

    from guided_diffusion import dist_util
    from guided_diffusion.io.description import read_description
    from guided_diffusion.io.remote import is_url, local_path
    from guided_diffusion.networks.precision import place
    from guided_diffusion.runs.best import local_weights
    from guided_diffusion.runs.mirror import Mirror
    from guided_diffusion.runs.provenance import (
        describe_network,
        described_experiment,
        has_untrained_null_class,
        require_known_steps,
    )
    from guided_diffusion.runs.weights import build_loaded, require_agreement
    from guided_diffusion.sampling.sample_set import SampleSet
    from guided_diffusion.sampling.samplers import Sampler
    from guided_diffusion.script_util import build_process, build_space

    dist_util.setup_dist()
    cache = paths.fetched_path(config)
    weights_name, weights = local_weights(weights_name, cache)
    if experiment is None:
        experiment = described_experiment(weights, args.overrides)
    experiment.student.architecture.require_guidable(
        args.guidance_scale, "--guidance_scale", experiment.where
    )
    folder = args.name or f"{experiment.name}-{Path(weights_name).stem}"
    default = paths.output_path(f"experiments/sample/{folder}", config)
    mirror = None
    if args.log_dir and is_url(args.log_dir):
        mirror = Mirror(args.log_dir, paths.remote_path(config))
    may_differ = {"config", "overrides", "model_path", "log_dir"}
    flags = {f"--{flag}": value for flag, value in vars(args).items() if flag not in may_differ}
    dist_util.require_same(flags | dotted(experiment_keys(experiment)))
    sampler = look_up(SAMPLERS, name, "--sampler")
    if not isinstance(sampler, Sampler):
        raise UserError(f"--sampler: {name} is no Sampler; name a Sampler(function)")
    samples = SampleSet(
        mirror.directory if mirror else local_path(args.log_dir) if args.log_dir else default,
        args.num_samples,
        seed=experiment.run.seed,
        sampler=(name, sampler),
        clip_denoised=args.clip_denoised,
        guidance_scale=args.guidance_scale,
    )
    if mirror:
        dist_util.from_rank_zero(mirror.pull)
    student = experiment.student
    require_agreement(student, weights, experiment.where)
    checkpoint = read_description(weights)
    if args.timestep_respacing is not None:
        student.process.timestep_respacing = sampler.respacing(args.timestep_respacing)
        build_process(student, "--timestep_respacing")  # for what it refuses to be told of the flag
    network, process = build_loaded(student, weights, experiment.where)
    require_known_steps(student, process, checkpoint)
    if args.guidance_scale and has_untrained_null_class(checkpoint):
        dist_util.warn(f"{weights}: guided by a null class that was not trained (class_dropout_prob 0)")
    place(network.eval(), student.architecture.use_fp16, experiment.run, frozen=True)
    provenance = describe_network(experiment)
    provenance |= {"model": weights.name, "step": checkpoint.get("step"), "checkpoint": checkpoint}
    samples.draw(network, process, build_space(student), weights, args.batch_size, provenance)
    if mirror:
        dist_util.from_rank_zero(mirror.push)


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
