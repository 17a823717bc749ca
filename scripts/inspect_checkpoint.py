"""Say what a checkpoint or a diffusers folder is: a configuration on stdout, explanations on stderr."""

from guided_diffusion.config import command_line, paths
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, look, tell."""
    parser = command_line.make_bare_parser(
        __doc__, "The configuration is what image_sample.py --config, and model: in a section, take."
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help=".pt, .ckpt, .safetensors, a run's directory, a diffusers folder, or owner/name on the Hub",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="what it does not say, such as noise_schedule=cosine",
    )
    parser.add_argument(
        "--check", action="store_true", help="load the network, and take its first step from noise"
    )
    args = parser.parse_intermixed_args()

    import sys
    from contextlib import redirect_stdout
    from pathlib import Path

    here = Path("inspected.yaml")  # where a configuration would lie
    name = paths.input_file(args.path, here, "PATH")

    from guided_diffusion.runs.best import local_weights
    from guided_diffusion.setups.inspecting import check, inspect

    with redirect_stdout(sys.stderr):
        _, weights = local_weights(name, paths.fetched_path(here))
        inspected = inspect(weights, args.overrides)
        print("\n".join(inspected.lines))
        if args.check:
            print(check(inspected))
        print(f"to sample: scripts/image_sample.py --config THIS.yaml --model_path {inspected.weights}")
    print(inspected.text, end="")


if __name__ == "__main__":
    run_script(main)
