"""Distil a student from a teacher and its dynamic batch: TCCD, or DKDM with both stages off."""

from functools import partial

from guided_diffusion.config import command_line
from guided_diffusion.processes.launch import detect_launch, run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["teacher", "student", "distill", "run"])
    parser.add_argument(
        "--resume_checkpoint", help="continue from this run directory or modelNNNNNN.pt; a path or a URL"
    )
    parser.add_argument(
        "--exp_dir", help="the run's directory, a path or a URL (default: a new one in experiments/kd)"
    )
    parser.add_argument("--wandb", action="store_true", help="also record to Weights & Biases")
    args, experiment = command_line.parse_distillation(parser)
    teacher, training = experiment.teacher, experiment.student.training
    weights_name = command_line.input_file(teacher.model_path, args.config, "teacher.model_path")
    initial_name = ""
    if training.model_path:
        initial_name = command_line.input_file(training.model_path, args.config, "student.model_path")
    run, reference_name = experiment.run, ""
    if run.eval_interval:
        reference_name = command_line.input_file(run.eval_reference, args.config, "run.eval_reference")
    batch_size = command_line.per_rank(training.batch_size, detect_launch().world_size, "student.batch_size")
    tempfile = command_line.output_path(teacher.tempfile, args.config)

    from guided_diffusion import dist_util
    from guided_diffusion.runs.provenance import describe_network
    from guided_diffusion.runs.run_directory import start_run
    from guided_diffusion.setups.distillation import distillation_loop, pool_file

    dist_util.setup_dist()
    cache = command_line.fetched_path(args.config)
    weights = dist_util.local_copy(weights_name, cache)
    initial = dist_util.local_copy(initial_name, cache) if initial_name else None
    load_judge = None
    if reference_name:
        from evaluations.judge import Judge

        load_judge = partial(Judge, dist_util.local_copy(reference_name, cache), run)
    with start_run("kd", experiment, args, batch_size) as (log, resume):
        distillation_loop(
            experiment,
            weights=weights,
            pool_path=pool_file(experiment, tempfile),
            batch_size=batch_size,
            log=log,
            initial=initial,
            resume=resume,
            description=describe_network(experiment.name, experiment.student, args.config),
            load_judge=load_judge,
        ).run()


if __name__ == "__main__":
    run_script(main)
