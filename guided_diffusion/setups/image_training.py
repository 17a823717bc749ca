"""Putting plain training together: images, network, objective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.settings import Experiment
from ..errors import UserError
from ..image_datasets import ImageDataset, open_dataset, sample_batches
from ..logger import RunLog
from ..networks.precision import place
from ..resample import create_named_schedule_sampler
from ..runs.checkpoint import Checkpoint
from ..runs.weights import load_network, require_agreement
from ..script_util import build_network, build_space
from ..spaces import LatentSpace
from ..train_util import TrainLoop, reseed
from ..training.grids import Grids, sampling_process
from ..training.objective import DiffusionTraining
from ..training.scoring import Judge, Scorer
from ..training.sources import ImageSource
from .encoding import encode_dataset


def training_loop(
    experiment: Experiment,
    *,
    data_dir: str,
    batch_size: int,
    num_workers: int,
    cache: Path,
    log: RunLog,
    initial: Path | None = None,
    resume: Checkpoint | None = None,
    description: dict[str, Any] | None = None,
    load_judge: Callable[[int], Judge] | None = None,
) -> TrainLoop:
    """Build everything that training on images needs, ready to run.

    Args:
        experiment: the configuration.
        data_dir: see `image_datasets.open_dataset`.
        batch_size: of this rank.
        num_workers: processes that load images.
        cache: where images encoded as latents lie, see `encode_dataset`.
        log: the record.
        initial: initial weights, if not random.
        resume: continue from this checkpoint.
        description: what checkpoints say of the network.
        load_judge: gives what scores images of a size, while the network trains; None for no scores.

    Raises:
        UserError: unreadable data, images or labels that do not fit the network.
    """
    student, run, device = experiment.student, experiment.run, dist_util.dev()
    architecture, training = student.architecture, student.training
    space = build_space(student)
    dataset: ImageDataset = open_dataset(data_dir, space.image_size, architecture.class_cond)
    if architecture.class_cond and dataset.num_classes > architecture.num_classes:
        raise UserError(
            f"{data_dir}: has {dataset.num_classes} classes, num_classes is {architecture.num_classes}"
        )
    if architecture.class_cond and dataset.num_classes < architecture.num_classes:
        log.info(
            f"WARNING: {data_dir}: has {dataset.num_classes} classes, num_classes is "
            f"{architecture.num_classes}: the others are never trained"
        )
    scorer = grids = None
    if load_judge is not None:
        scorer = Scorer(load_judge, run, sampling_process(student, run), space, batch_size)
    if run.sample_interval >= 0:
        grids = Grids(sampling_process(student, run), space, run.num_samples, run.seed)
    encode: Callable[[th.Tensor], th.Tensor] = space.encode
    if isinstance(space, LatentSpace):
        dataset = encode_dataset(dataset, space, training.random_flip, cache)
        encode = space.draw
    reseed(run.seed, 0, 2**32 - 2)  # the same initial weights on every rank
    network, process = build_network(student)
    if resume is not None:
        require_agreement(student, resume.path("model"))
    elif initial is not None:
        require_agreement(student, initial)
        load_network(network, initial)
    place(network, architecture.use_fp16, run)
    sampler = create_named_schedule_sampler(training.schedule_sampler, process.num_timesteps)
    objective = DiffusionTraining(process, sampler, clip_last=training.clip_last).to(device)
    batches = sample_batches(
        dataset,
        batch_size,
        seed=run.seed,
        rank=dist_util.rank(),
        world_size=dist_util.world_size(),
        start_step=resume.step if resume else 0,
        num_workers=num_workers,
        random_flip=training.random_flip,
    )
    count = sum(p.numel() for p in network.parameters())
    log.info(
        f"objective: {objective.describe()}; {count / 1e6:.2f}M parameters; {len(dataset)} images"
        f"{f' of {dataset.num_classes} classes' if architecture.class_cond else ''}"
        f"{', mirrored at random' if training.random_flip else ''}"
    )
    return TrainLoop(
        network=network,
        objective=objective,
        source=ImageSource(batches, encode, architecture.class_cond),
        process=process,
        training=training,
        run=run,
        log=log,
        grids=grids,
        scorer=scorer,
        resume=resume,
        description=description,
    )
