"""Prepare the dynamic batch: the teacher denoises a pool of noise to mixed levels, without any data."""

from guided_diffusion.config import command_line, paths
from guided_diffusion.processes.launch import detect_launch, run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["teacher", "distill", "run"])
    parser.add_argument("--overwrite", action="store_true", help="prepare anew even if the pool exists")
    args, experiment = command_line.parse_distillation(parser)
    from guided_diffusion.errors import UserError

    teacher = experiment.teacher
    if teacher.iter_choice == "iterative_distillation":
        raise UserError(f"{args.config}: iterative_distillation starts from noise: nothing to prepare")
    weights_name = paths.input_file(teacher.model_path, args.config, "teacher.model_path")
    batch_size = command_line.per_rank(
        experiment.student.training.batch_size, detect_launch().world_size, "student.batch_size"
    )
    tempfile = command_line.pool_path(experiment, args.config)

    from guided_diffusion import dist_util
    from guided_diffusion.setups.preparing import prepare_pool

    dist_util.setup_dist()
    weights = dist_util.local_copy(weights_name, paths.fetched_path(args.config))
    prepare_pool(
        experiment, weights=weights, tempfile=tempfile, batch_size=batch_size, overwrite=args.overwrite
    )


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
