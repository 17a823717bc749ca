"""Distil a student from a teacher and its dynamic batch: TCCD, or DKDM with both stages off."""

from functools import partial

from guided_diffusion.config import command_line, paths
from guided_diffusion.processes.launch import detect_launch, run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["teacher", "student", "distill", "run"])
    command_line.add_run_options(parser, "kd")
    args, experiment = command_line.parse_distillation(parser)
    teacher, training = experiment.teacher, experiment.student.training
    weights_name = paths.input_file(teacher.model_path, args.config, "teacher.model_path")
    initial_name, reference_name = command_line.run_inputs(experiment, args.config)
    batch_size = command_line.per_rank(training.batch_size, detect_launch().world_size, "student.batch_size")
    tempfile = command_line.pool_path(experiment, args.config)

    from guided_diffusion import dist_util
    from guided_diffusion.runs.provenance import describe_training
    from guided_diffusion.runs.start import start_run
    from guided_diffusion.setups.distillation import distillation_loop
    from guided_diffusion.setups.pools import pool_file

    dist_util.setup_dist()
    cache = paths.fetched_path(args.config)
    weights = dist_util.local_copy(weights_name, cache)
    initial = dist_util.local_copy(initial_name, cache) if initial_name else None
    load_judge = None
    if reference_name:
        from evaluations.judge import Judge

        load_judge = partial(Judge, dist_util.local_copy(reference_name, cache), experiment.run)
    with start_run("kd", experiment, args, batch_size) as (log, resume):
        distillation_loop(
            experiment,
            weights=weights,
            pool_path=pool_file(experiment, tempfile),
            batch_size=batch_size,
            log=log,
            initial=initial,
            resume=resume,
            description=describe_training(experiment),
            load_judge=load_judge,
        ).run()


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
