"""Putting plain training together: images, network, objective."""

from pathlib import Path

from .. import dist_util
from ..config.settings import Experiment
from ..distill.objectives import DiffusionTraining
from ..errors import UserError
from ..image_datasets import open_dataset, sample_batches
from ..logger import RunLog
from ..networks.precision import place
from ..resample import create_named_schedule_sampler
from ..runs.checkpoint import Checkpoint, load_network
from ..script_util import build_network
from ..train_util import TrainLoop, reseed, sample_process
from ..training.sources import ImageSource


def training_loop(
    experiment: Experiment,
    *,
    data_dir: str,
    batch_size: int,
    num_workers: int,
    log: RunLog,
    initial: Path | None = None,
    resume: Checkpoint | None = None,
) -> TrainLoop:
    """Build everything that training on images needs, ready to run.

    Args:
        experiment: the configuration.
        data_dir: see `image_datasets.open_dataset`.
        batch_size: of this rank.
        num_workers: processes that load images.
        log: the record.
        initial: initial weights, if not random.
        resume: continue from this checkpoint.

    Raises:
        UserError: unreadable data, images or labels that do not fit the network.
    """
    student, run, device = experiment.student, experiment.run, dist_util.dev()
    dataset = open_dataset(data_dir, student.image_size, student.class_cond)
    if student.class_cond and dataset.num_classes > student.num_classes:
        raise UserError(
            f"{data_dir}: has {dataset.num_classes} classes, num_classes is {student.num_classes}"
        )
    reseed(run.seed, 0, 2**32 - 2)  # the same initial weights on every rank
    model, diffusion = build_network(student)
    if initial is not None:
        load_network(model, initial)
    place(model, student, run)
    sampler = create_named_schedule_sampler(student.schedule_sampler, diffusion.num_timesteps)
    objective = DiffusionTraining(diffusion, sampler).to(device)
    batches = sample_batches(
        dataset,
        batch_size,
        seed=run.seed,
        rank=dist_util.rank(),
        world_size=dist_util.world_size(),
        start_step=resume.step if resume else 0,
        num_workers=num_workers,
    )
    count = sum(p.numel() for p in model.parameters())
    log.info(f"objective: {diffusion.loss_type.name}; {count / 1e6:.2f}M parameters; {len(dataset)} images")
    return TrainLoop(
        model=model,
        objective=objective,
        source=ImageSource(batches, student.class_cond),
        diffusion=diffusion,
        sample_diffusion=sample_process(student, run),
        student=student,
        run=run,
        log=log,
        resume=resume,
    )
