"""Every experiment under yaml/: the network its name says, and one real iteration at a small size."""

import functools
import re

import numpy as np
import pytest
import torch as th
from tiny import ROOT, T, denoiser, make_teacher, make_vae, randomise

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.settings import DistillationExperiment, flat
from guided_diffusion.distill.dynamic_batch import DynamicBatch, pool_size
from guided_diffusion.distill.pool_file import read_pool, write_pool
from guided_diffusion.logger import RunLog, read_progress
from guided_diffusion.script_util import build_network, build_space
from guided_diffusion.setups.distillation import distillation_loop
from guided_diffusion.setups.image_training import training_loop
from guided_diffusion.setups.pools import pool_identity

EXPERIMENTS = sorted(ROOT.glob("yaml/*/exp/*.yaml"))
ON_MIXED_DATA = [  # names that stand for the file without the ratio
    ROOT / f"yaml/{name}-Baseline-{ratio}.yaml"
    for name, ratio in (
        ("cifar10_32/exp/CIFAR10-14M", "0.05"),
        ("celeba_64/exp/CelebA64-57M", "0.15"),
        ("imagenet_32/exp/ImageNet32-14M", "1"),
    )
]
BATCH = 4
SMALL_ADM = [
    *("num_channels=32", "num_res_blocks=1", "channel_mult=1,2", "num_head_channels=32"),
    *("attention_resolutions=16", f"diffusion_steps={T}"),
]
SMALL_DIT = ["num_layers=2", "num_attention_heads=2", "attention_head_dim=16", f"diffusion_steps={T}"]
TRAINING = [f"batch_size={BATCH}", "microbatch=2", "log_interval=1"]
RUN = ["run.iterations=1", "run.sample_interval=999"]


def in_section(name, overrides):
    return [f"{name}.{override}" for override in overrides]


def small(denoiser):
    """The overrides that make a network and its process small."""
    return SMALL_DIT if denoiser.architecture.architecture == "dit" else SMALL_ADM


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The overrides by which a configuration of latents has a small random VAE."""
    folder = tmp_path_factory.mktemp("vae")
    make_vae(folder, "VQModel", factor=4)
    return lambda path, where="": [f"{where}vae_path={folder}"] if image_size_of(path) == 256 else []


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A random tiny teacher's file for a section of settings; the same for all of one kind and size."""
    folder = tmp_path_factory.mktemp("teachers")

    def teacher(settings):
        own = settings.architecture
        added = getattr(own, "use_scale_shift_norm", None)
        path = folder / f"{own.architecture}-{own.image_size}-{added}-{settings.process.learn_sigma}.pt"
        if not path.exists():
            make_teacher(settings, path)
        return path

    return teacher


@pytest.mark.parametrize(
    "path", [p for p in EXPERIMENTS if not p.stem.startswith("digits")], ids=lambda p: p.stem
)
def test_the_name_tells_the_students_size(path):
    student = load_experiment(path).student
    keys = tuple((flat(student.architecture) | flat(student.process)).items())
    assert millions_of_parameters(keys) == int(re.search(r"-(?:DiT)?(\d+)M-", path.stem)[1])


@functools.cache
def millions_of_parameters(keys):
    with th.device("meta"):
        model, _ = build_network(denoiser(**dict(keys)))
    return sum(parameter.numel() for parameter in model.parameters()) // 10**6


@pytest.mark.parametrize("path", EXPERIMENTS + ON_MIXED_DATA, ids=lambda path: path.stem)
def test_one_iteration(path, teachers, vae, tmp_path):
    plain = load_experiment(path)
    th.manual_seed(0)
    distils = isinstance(plain, DistillationExperiment)
    if not distils:
        loop = baseline(path, vae(path), tmp_path)
        terms = {"mse", "vb"}
    else:
        loop = distillation(path, teachers, vae(path, "teacher."), tmp_path)
        stage1, stage2 = plain.distill.stage1_weight > 0, plain.distill.stage2_weight > 0
        terms = {"stage1_mse", "stage1_vb"}
        terms |= {"stage1_align"} if stage1 else set()
        terms |= {"stage2_mse", "stage2_vb"} if stage2 else set()
        assert (stage1, stage2) == stages_of(path.stem)
    if not plain.student.process.learn_sigma:
        terms = {name for name in terms if not name.endswith("vb")}
    size = plain.student.architecture.image_size
    assert loop.network.shape == (3, size, size)
    assert loop.grids.space.image_size == image_size_of(path)
    randomise(loop.network)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    levels = loop.source.pool.levels.clone() if distils else None
    loop.run()

    (row,) = read_progress(tmp_path / "run" / "progress.csv")
    logged = {name for name in row if re.fullmatch(r"(stage\d_)?(mse|vb|align)", name)}
    assert logged == terms
    assert all(np.isfinite(value) for value in row.values())
    assert row["step"] == loop.step == 1 and row["skipped"] == 0
    same = [th.equal(a, b) for a, b in zip(before, loop.parameters, strict=True)]
    student = len([*loop.network.parameters()])
    assert not any(same[:student]) and (student == len(same) or not all(same[student:]))
    assert (tmp_path / "run" / "model000001.pt").exists()
    if distils:
        steps = levels - loop.source.pool.levels
        moved = steps[steps != 0].tolist()
        assert len(moved) == BATCH
        assert plain.distill.advance_stride > 1 or moved == [1] * BATCH
        saved = read_pool(tmp_path / "run" / "teacher-state-000001.cache", T, (3, size, size))
        assert th.equal(saved.levels, loop.source.pool.levels)


def distillation(path, teachers, space, folder):
    plain = load_experiment(path)
    overrides = in_section("teacher", small(plain.teacher)) + RUN + space
    overrides += in_section("student", small(plain.student) + TRAINING)
    experiment = load_experiment(path, overrides)
    settings = experiment.teacher
    weights = teachers(settings)
    size = pool_size(settings.iter_choice, settings.BATCH, T, BATCH)
    if settings.iter_choice != "iterative_distillation":
        pool = DynamicBatch.of_noise(size, build_space(settings).shape, T)
        pool.levels = th.randint(1, T, (size,))
        write_pool(folder / "pool.cache", [pool], pool_identity(experiment, weights, size))
    return distillation_loop(
        experiment,
        weights=weights,
        pool_path=folder / "pool.cache",
        batch_size=BATCH,
        log=RunLog(folder / "run"),
    )


def baseline(path, space, folder):
    experiment = load_experiment(path, small(load_experiment(path).student) + TRAINING + RUN + space)
    size = build_space(experiment.student).image_size
    images = np.random.default_rng(0).integers(0, 256, (2 * BATCH, size, size, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images)
    return training_loop(
        experiment,
        data_dir=str(folder / "images.npz"),
        batch_size=BATCH,
        num_workers=0,
        cache=folder / "cache",
        log=RunLog(folder / "run"),
    )


def stages_of(name):
    """Whether stages 1 and 2 are on, by an experiment's name."""
    if "Dynamic" in name:
        return False, False
    return not name.endswith("stage2"), not name.endswith("stage1")


def image_size_of(path):
    return int(path.parent.parent.name.rpartition("_")[2])
