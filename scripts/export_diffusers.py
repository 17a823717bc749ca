"""Export a trained network as a folder of diffusers': DiffusionPipeline.from_pretrained(DIR) loads it."""

from guided_diffusion.config import command_line, paths
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["student"], "what the checkpoint says of itself")
    parser.add_argument("--model_path", required=True, help="the checkpoint: model*.pt or ema_*.pt")
    parser.add_argument("--out", type=local_path, required=True, help="the folder to write")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hub under this name")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--score", action="append", default=[], help="a line for the model card, 'FID 5.1'; may be repeated"
    )
    args = parser.parse_intermixed_args()
    experiment = load_experiment(args.config, args.overrides) if args.config else None

    from pathlib import Path

    config = args.config or Path(args.model_path)
    weights_name = paths.input_file(args.model_path, config, "--model_path")

    from guided_diffusion.runs.best import local_weights
    from guided_diffusion.runs.provenance import described_experiment
    from guided_diffusion.setups import exporting

    if args.push:
        exporting.require_hub_name(args.push)
    out = Path(args.out)
    _, weights = local_weights(weights_name, paths.fetched_path(config))
    if args.push and not args.overwrite and not args.score and exporting.is_export_of(weights, out):
        exporting.rename_in_card(out, args.push)
        print(f"{out} is of {weights.name} already and stays as it is (--overwrite exports it anew)")
    else:
        experiment = experiment or described_experiment(weights, args.overrides)
        exporting.export_pipeline(
            experiment, weights, out, name=args.push or "", scores=args.score, overwrite=args.overwrite
        )
        print(f"wrote {out}: diffusers loads it, and gives the same")
    if args.push:
        exporting.push(out, args.push)
        print(f"uploaded as {args.push}")


if __name__ == "__main__":
    run_script(main)
