"""Export a trained network as a folder of diffusers': DiffusionPipeline.from_pretrained(DIR) loads it."""

from guided_diffusion.config import command_line, paths
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["student"])
    parser.add_argument("--model_path", required=True, help="the checkpoint: model*.pt or ema_*.pt")
    parser.add_argument("--out", type=local_path, required=True, help="the folder to write")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hub under this name")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    parser.add_argument(
        "--score", action="append", default=[], help="a line for the model card, 'FID 5.1'; may be repeated"
    )
    args, experiment = command_line.parse(parser)
    weights = paths.input_file(args.model_path, args.config, "--model_path")

    from pathlib import Path

    from guided_diffusion.runs.best import local_weights
    from guided_diffusion.setups.exporting import export_pipeline, push, require_hub_name

    if args.push:
        require_hub_name(args.push)
    out = Path(args.out)
    _, local = local_weights(weights, paths.fetched_path(args.config))
    export_pipeline(experiment, local, out, scores=args.score, overwrite=args.overwrite)
    print(f"wrote {out}: diffusers loads it, and gives the same")
    if args.push:
        push(out, args.push)
        print(f"uploaded as {args.push}")


if __name__ == "__main__":
    run_script(main)
