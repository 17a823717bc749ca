"""Latent diffusion and its distillation on real data, in minutes: the handwritten digits.

Trains a small AutoencoderKL of diffusers' on the digits (16x16 images, 2x8x8 latents), a diffusion model in
its latents, and distils that without data into a student of a quarter of its size, by the commands that a
user types. Prints the digits-FD of the images that the VAE reconstructs, of the teacher's samples and of the
student's. What is there is reused: the same command goes on where it was stopped.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch as th

from evaluations.digits_floor import real_floor
from evaluations.evaluator import evaluate
from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.diffusers_library import import_diffusers
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.npz_writer import create_npz
from guided_diffusion.io.progress import Progress
from guided_diffusion.processes.launch import run_script
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import load_state_dict
from guided_diffusion.spaces import LatentSpace, PixelSpace

ROOT = Path(__file__).resolve().parent.parent
CHANNELS, SIZE = 2, 8  # of the latents
KL_WEIGHT = 0.02  # beside the mean squared error of pixels in [-1, 1]


def train_vae(folder: Path, iterations: int, seed: int) -> None:
    """Train the autoencoder; its folder has the factors that make its latents of mean 0 and variance 1."""
    if (folder / "config.json").is_file():
        return
    th.manual_seed(seed)
    vae = import_diffusers("the VAE").AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        layers_per_block=1,
    )
    x = PixelSpace(16).encode(th.from_numpy(load_digit_images()[0].copy()))
    optimizer = th.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations, pct_start=0.1)
    with Progress(iterations, "VAE", "it") as progress:
        for _ in range(iterations):
            batch = x[th.randint(len(x), (64,))]
            posterior = vae.encode(batch).latent_dist
            error = (vae.decode(posterior.sample()).sample - batch).square().mean()
            (error + KL_WEIGHT * posterior.kl().mean() / batch[0].numel()).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.advance()
    with th.no_grad():
        z = th.cat([vae.encode(part).latent_dist.sample() for part in x.split(256)])
    vae.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=float(z.mean()))
    partial = folder.with_name("vae.partial")
    vae.save_pretrained(partial)
    shutil.move(partial, folder)
    print(f"VAE: mean squared error {float(error):.4f}, latents of standard deviation {float(z.std()):.2f}")


@th.no_grad()
def reconstruct(vae: Path, out: Path, count: int) -> Path:
    """Digits encoded and decoded again, as an npz."""
    space, path = LatentSpace(vae, SIZE), out / f"reconstructed-{count}.npz"
    images = load_digit_images()[0][np.random.default_rng(0).permutation(1797)[:count]]
    with create_npz(path, count) as writer:
        writer.append(space.decode(space.encode(th.from_numpy(images))), None)
    return path


def run(script: str, *arguments: object) -> float:
    """Run one of the project's commands; its seconds.

    Raises:
        UserError: it failed; it has said why.
    """
    print(f"\n$ python {script} {' '.join(map(str, arguments))}", flush=True)
    started = time.monotonic()
    if status := subprocess.run([sys.executable, ROOT / script, *map(str, arguments)]).returncode:
        raise UserError(f"{script} failed (status {status}); running this again continues")
    return time.monotonic() - started


def last_ema(directory: Path, rate: str) -> Path:
    """The averaged weights of a finished run."""
    checkpoint = newest_checkpoint(directory)
    assert checkpoint is not None
    return checkpoint.path(f"ema_{rate}")


def main() -> None:
    """Train, distil, sample, score."""
    parser = make_bare_parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/latent-digits", help="working folder")
    parser.add_argument("--vae_iterations", type=int, default=1500)
    parser.add_argument("--teacher_iterations", type=int, default=2000)
    parser.add_argument("--student_iterations", type=int, default=1000)
    parser.add_argument("--num_samples", type=int, default=1000, help="images per score (at most 1797)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out, vae, n = args.out.resolve(), args.out.resolve() / "vae", args.num_samples
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    train_vae(vae, args.vae_iterations, args.seed)
    run("datasets/digits.py", "--out", out)
    seconds = {"reconstruction": time.monotonic() - started}

    # Latents are not clipped, and without that the first steps of the cosine schedule run away.
    keys = [f"image_size={SIZE}", "channel_mult=1,2", "noise_schedule=linear"]
    config = ROOT / "yaml/digits_16/exp/digits-teacher.yaml"
    seconds["teacher"] = run(
        "scripts/image_train.py", "--config", config, "--data_dir", out / "digits.npz",
        "--exp_dir", out / "train", f"vae_path={vae}", *keys, f"run.iterations={args.teacher_iterations}",
        f"lr_anneal_steps={args.teacher_iterations}", f"run.seed={args.seed}",
    )  # fmt: skip
    teacher = last_ema(out / "train", "0.998")
    config = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
    overrides = [
        f"teacher.model_path={teacher}", f"teacher.vae_path={vae}", f"teacher.tempfile={out / 'pool.cache'}",
        *(f"{section}.{key}" for section in ("teacher", "student") for key in keys),
        f"run.iterations={args.student_iterations}", f"student.lr_anneal_steps={args.student_iterations}",
        f"run.seed={args.seed}",
    ]  # fmt: skip
    seconds["student"] = run("scripts/dynamic_prepare.py", "--config", config, *overrides)
    seconds["student"] += run("scripts/image_kd.py", "--config", config, "--exp_dir", out / "kd", *overrides)
    weights = {"teacher": teacher, "student": last_ema(out / "kd", "0.99")}

    files = {"reconstruction": reconstruct(vae, out, n)}
    for name, path in weights.items():
        run(
            "scripts/image_sample.py", "--model_path", path, "--num_samples", n, "--batch_size", 125,
            "--timestep_respacing", 50, "--log_dir", out / name, f"run.seed={args.seed}",
        )  # fmt: skip
        files[name] = out / name / f"samples_{n}x16x16x3.npz"
    print(f"\n{'':24}{'digits-FD':>10}{'parameters':>12}{'training':>10}")
    print(f"{'real digits (floor)':24}{real_floor(out / 'digits.npz', n).fd:10.2f}")
    state = load_state_dict(vae / "diffusion_pytorch_model.safetensors")
    sizes = {"reconstruction": state} | {name: load_state_dict(path) for name, path in weights.items()}
    for name, path in files.items():
        fd = evaluate(out / "digits.npz", path, backend="digits", use_cache=False).fd
        count = sum(value.numel() for value in sizes[name].values()) / 1e6
        print(f"{name:24}{fd:10.2f}{f'{count:.2f}M':>12}{f'{seconds[name]:.0f} s':>10}")
    print(f"{n} images each, 50 ancestral steps, seed {args.seed}; lower is better.")


if __name__ == "__main__":
    run_script(main)
