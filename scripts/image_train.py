"""Train a diffusion model on images: the embedded teacher, or the data-based baselines."""

from functools import partial
from pathlib import Path

from guided_diffusion.config import command_line, paths
from guided_diffusion.processes.launch import detect_launch, run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["", "run"])
    parser.add_argument(
        "--data_dir", required=True, help="folder of images, an .npz with arr_0, or a folder of .npz"
    )
    command_line.add_run_options(parser, "train")
    parser.add_argument(
        "--num_workers",
        type=command_line.not_negative,
        default=0,
        help="processes that load images (default 0)",
    )
    args, experiment = command_line.parse(parser)
    from guided_diffusion.config.settings import DistillationExperiment
    from guided_diffusion.errors import UserError

    training = experiment.student.training
    if isinstance(experiment, DistillationExperiment):
        raise UserError(f"{args.config}: has a 'teacher' section; image_kd.py distils, this trains on images")
    if not args.data_dir or not Path(args.data_dir).exists():
        raise UserError(f"--data_dir: no such file or folder: '{args.data_dir}'")
    initial_name, reference_name = command_line.run_inputs(experiment, args.config)
    batch_size = command_line.per_rank(training.batch_size, detect_launch().world_size, "batch_size")

    from guided_diffusion import dist_util
    from guided_diffusion.runs.provenance import describe_training
    from guided_diffusion.runs.start import start_run
    from guided_diffusion.setups.image_training import training_loop

    dist_util.setup_dist()
    cache = paths.fetched_path(args.config)
    initial = dist_util.local_copy(initial_name, cache) if initial_name else None
    load_judge = None
    if reference_name:
        from evaluations.judge import Judge

        load_judge = partial(Judge, dist_util.local_copy(reference_name, cache), experiment.run)
    with start_run("train", experiment, args, batch_size) as (log, resume):
        training_loop(
            experiment,
            data_dir=args.data_dir,
            batch_size=batch_size,
            num_workers=args.num_workers,
            cache=paths.output_path("experiments/cache", args.config),
            log=log,
            initial=initial,
            resume=resume,
            description=describe_training(experiment),
            load_judge=load_judge,
        ).run()


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
