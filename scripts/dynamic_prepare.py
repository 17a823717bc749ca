"""Prepare the dynamic batch: the teacher denoises a pool of noise to mixed levels, without any data."""

from guided_diffusion.config import command_line
from guided_diffusion.processes.launch import detect_launch, run_script


def main() -> None:
    """Parse, build, run."""
    parser = command_line.make_parser(__doc__, ["teacher", "distill", "run"])
    parser.add_argument("--overwrite", action="store_true", help="prepare anew even if the pool exists")
    args, experiment = command_line.parse_distillation(parser)
    from guided_diffusion.errors import UserError

    teacher_settings = experiment.teacher
    if teacher_settings.iter_choice == "iterative_distillation":
        raise UserError(f"{args.config}: iterative_distillation starts from noise: nothing to prepare")
    if not teacher_settings.tempfile:
        raise UserError(f"{args.config}: teacher.tempfile is not set: where should the pool be written?")
    weights_name = command_line.input_file(teacher_settings.model_path, args.config, "teacher.model_path")
    batch = command_line.per_rank(
        experiment.student.training.batch_size, detect_launch().world_size, "student.batch_size"
    )
    tempfile = command_line.output_path(teacher_settings.tempfile, args.config)

    from guided_diffusion import dist_util
    from guided_diffusion.distill.dynamic_batch import pool_size, prepare
    from guided_diffusion.distill.pool_file import join_parts, part_path, read_pool, write_pool
    from guided_diffusion.io.files import remove_leftovers
    from guided_diffusion.io.progress import progress_bar
    from guided_diffusion.setups.distillation import (
        load_teacher,
        noise_pool,
        pool_file,
        pool_identity,
        pool_seed,
        stored,
    )
    from guided_diffusion.train_util import reseed

    dist_util.setup_dist()
    weights = dist_util.local_copy(weights_name, command_line.fetched_path(args.config))
    rank, world = dist_util.rank(), dist_util.world_size()
    teacher = load_teacher(experiment, weights)
    total, shape = teacher.process.num_timesteps, teacher.space.shape
    size = pool_size(teacher_settings.iter_choice, teacher_settings.BATCH, total, batch)
    identity = pool_identity(experiment, weights, size * world)
    path = pool_file(experiment, tempfile)
    if path.is_file() and not args.overwrite:
        read_pool(path, total, shape, expected=identity)
        if rank == 0:
            print(f"{path} is already prepared for this configuration (--overwrite prepares it anew)")
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    with dist_util.held(path):
        if rank == 0:
            remove_leftovers(path.parent, path.name)
        reseed(pool_seed(experiment), rank, 0)
        pool = noise_pool(teacher, size)
        if rank == 0:
            print(
                f"preparing {size * world} samples on {world} rank(s), T = {total}, "
                f"stride {experiment.distill.stride}, seed {pool_seed(experiment)}"
            )
        bar = progress_bar(size, "preparing", active=rank == 0)
        arrived, told = 0, 0
        for count in prepare(pool, teacher, teacher_settings.batch_size, experiment.distill.stride):
            arrived += count
            bar.update(count)
            if bar.disable and rank == 0 and 10 * arrived // size > told:
                told = 10 * arrived // size
                print(f"  {arrived} of {size} samples are at their level", flush=True)
        bar.close()

        pool = stored(pool, experiment)
        if world == 1:
            write_pool(path, [pool], identity)
        else:
            write_pool(part_path(path, rank), [pool], identity)
            dist_util.barrier()
            with dist_util.rank_zero_first() as first:
                if first:
                    join_parts(path, total, shape, identity, world)
        if rank == 0:
            print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
