"""Tiny networks and configurations that whole runs finish with in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch as th
import yaml

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.registry import ARCHITECTURES, settings_of
from guided_diffusion.config.settings import Architecture, Denoiser, Process
from guided_diffusion.distill.teacher import Teacher
from guided_diffusion.io.diffusers_library import import_diffusers
from guided_diffusion.script_util import build_network
from guided_diffusion.spaces import PixelSpace

ROOT = Path(__file__).resolve().parent.parent
T = 20


def network(image_size=16, channels=32, **more):
    keys = {
        "image_size": image_size,
        "num_channels": channels,
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": str(image_size // 2),
        "channel_mult": "1,2",
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "learn_sigma": True,
        "diffusion_steps": T,
        "noise_schedule": "cosine",
    }
    return keys | more


def denoiser(**keys):
    """The settings of a network and its process, from flat keys."""
    process = {field: keys.pop(field) for field in vars(Process()) if field in keys}
    settings = settings_of(ARCHITECTURES, keys.get("architecture", "adm"), "architecture", Architecture)
    return Denoiser(settings(**keys), Process(**process))


def teacher_of(model, diffusion, shape=(3, 32, 32)):
    """A teacher made of any function of (x, timesteps, y) and a process."""
    return Teacher(model, diffusion, PixelSpace(shape[1]))


def distillation(folder, image_size=16, **more):
    """Write a configuration and a random teacher into a folder; return the configuration's path."""
    shared = {key: more.pop(key) for key in ("class_cond", "num_classes") if key in more}
    config = {
        "teacher": {
            "BATCH": 0.4,
            "batch_size": 6,
            "model_path": str(folder / "teacher.pt"),
            "iter_choice": "dynamic_iterative_distillation",
            "tempfile": str(folder / "pool.cache"),
            **network(image_size, **shared),
        },
        "student": {
            "lr": 1e-3,
            "batch_size": 4,
            "ema_rate": "0.9,0.99",
            "log_interval": 2,
            "save_interval": 4,
            **network(image_size, **shared),
        },
        "run": {"iterations": 6, "sample_interval": -1},
    }
    for key, value in more.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    make_teacher(load_experiment(path).teacher, folder / "teacher.pt")
    return path


def give_student_dit_keys(config, image_size):
    """In a configuration's file, give the student a small DiT's keys; its architecture is as it was."""
    keys = yaml.safe_load(config.read_text())
    process = {
        "image_size": image_size,
        "learn_sigma": True,
        "diffusion_steps": T,
        "noise_schedule": "cosine",
    }
    heads = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    keys["student"] = {k: v for k, v in keys["student"].items() if k not in network()} | process | heads
    config.write_text(yaml.safe_dump(keys))


def make_teacher(settings, path):
    """Save a random network that predicts something other than zero."""
    th.manual_seed(0)
    model, _ = build_network(settings)
    randomise(model)
    th.save(model.state_dict(), path)


def make_vae(folder, kind="AutoencoderKL", *, factor=2, channels=3, seed=0, **config):
    """Save a small random VAE whose images are `factor` times as high and wide as its latents; return it."""
    diffusers, levels = import_diffusers("the test"), factor.bit_length()
    th.manual_seed(seed)
    config = {"latent_channels": channels, "norm_num_groups": 4, "layers_per_block": 1} | config
    vae = getattr(diffusers, kind)(
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **config,
    )
    if kind == "VQModel":
        th.nn.init.normal_(vae.quantize.embedding.weight)
    vae.save_pretrained(folder)
    return vae.eval().requires_grad_(False)


@th.no_grad()
def randomise(module):
    """Give the layers that start at zero small weights, so that every gradient flows."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return module


def script(name, *args, ranks=0, cwd=None, check=True, **environment):
    """Run a script as a user does; `ranks` > 0 through mpiexec."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    if ranks:
        command = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks), *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def one_line_error(done):
    """The single line a mistake is told in: no traceback, status not 0."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
