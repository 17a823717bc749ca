"""Pipelines in latents, from diffusers and back: with their VAE, compared with diffusers' own images."""

import json
import re

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from test_export import DIT, UNET, prepared
from test_foreign import SCHEDULE, STUDENTS, DDIMScheduler, diffusers, distillation_config, dit, loaded, unet
from tiny import make_vae, one_line_error

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.script_util import build_process, build_space

CLASSES = {"class_cond": True, "num_classes": 5}


def pipeline_folder(folder, kind, vae_kind="AutoencoderKL"):
    """A pipeline of tiny parts, saved by diffusers."""
    vae = make_vae(folder / "vae", vae_kind, channels=3, scaling_factor=0.5)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    if kind == "LDMPipeline":
        pipeline = diffusers.LDMPipeline(vqvae=vae, unet=unet(), scheduler=scheduler)
    else:
        network = dit(in_channels=3, out_channels=6, num_embeds_ada_norm=5)
        pipeline = diffusers.DiTPipeline(transformer=network, vae=vae, scheduler=scheduler)
    pipeline.save_pretrained(folder / kind)
    return folder / kind, pipeline


@pytest.mark.parametrize(
    "kind, vae_kind",
    [("LDMPipeline", "VQModel"), ("LDMPipeline", "AutoencoderKL"), ("DiTPipeline", "AutoencoderKL")],
)
def test_a_pipelines_images_are_its_own(tmp_path, kind, vae_kind):
    folder, pipeline = pipeline_folder(tmp_path, kind, vae_kind)
    settings, network, _ = loaded(folder)
    space = build_space(settings)
    assert (space.kind, space.scale, space.shape) == (vae_kind, 0.5, (3, 8, 8))
    assert not settings.process.clip_denoised
    generator, labels = th.Generator().manual_seed(3), [0, 4]
    if kind == "LDMPipeline":
        images = pipeline(2, generator=generator, num_inference_steps=5, output_type="np").images
        y = None
    else:
        images = pipeline(labels, 1.0, generator, num_inference_steps=5, output_type="np").images
        y = {"y": th.tensor(labels)}
    noise = th.randn(2, 3, 8, 8, generator=th.Generator().manual_seed(3))
    process = build_process(settings, "timestep_respacing", "ddim5")
    with th.no_grad():
        x = process.ddim_sample_loop(network, noise.shape, noise=noise, model_kwargs=y)
    ours = (space.pixels(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - images).max() < 1e-4


@pytest.mark.parametrize("kind", ["LDMPipeline", "DiTPipeline"])
def test_a_pipeline_is_distilled_and_exported(tmp_path, kind):
    folder, _ = pipeline_folder(tmp_path, kind)
    student = STUDENTS["ViT" if kind == "LDMPipeline" else "CNN"]
    config = distillation_config(tmp_path, folder, student)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    grid = ["run.sample_interval=4", "run.sample_respacing=2", "run.num_samples=2"]
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", *grid)
    weights = tmp_path / "run/ema_0.9_000004.pt"
    flags = ["--config", config, "--model_path", weights]
    script_here("scripts/image_sample.py", *flags, "--num_samples", 2, "--timestep_respacing", 2,
                "--log_dir", tmp_path / "s")  # fmt: skip
    with np.load(tmp_path / "s/samples_2x16x16x3.npz") as samples:
        assert samples["arr_0"].shape == (2, 16, 16, 3)
    script_here("scripts/export_diffusers.py", *flags, "--out", tmp_path / "out")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__ != kind
    card = (tmp_path / "out/README.md").read_text()
    assert f"Teacher: {folder.name}\n" in card and "distilled by TCCD" in card and "16x16 images" in card


CASES = {
    "LDMPipeline": UNET | {"learn_sigma": False},
    "LDMPipeline of VQ": UNET | {"vae": "VQModel"},
    "LDMPipeline with classes": UNET | CLASSES,
    "DiTPipeline": DIT,
    "DiTPipeline with classes": DIT | CLASSES,
    "DiTPipeline with a fixed variance": DIT | CLASSES | {"learn_sigma": False},
}


@pytest.mark.parametrize("name", CASES)
def test_an_export_in_latents_loads_and_its_cards_code_runs(tmp_path, name):
    keys = dict(CASES[name])
    make_vae(tmp_path / "vae", keys.pop("vae", "AutoencoderKL"), channels=3, scaling_factor=0.7)
    script_here(*prepared(tmp_path, keys | {"vae_path": str(tmp_path / "vae"), "vae_scale": 0.4}))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline).__name__ == name.split()[0]
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S)[1]
    code = code.replace("50", "5").replace('"out"', repr(str(tmp_path / "out")))
    names: dict = {}
    exec(code, names)
    assert len(names["images"]) == 4 and names["images"][0].size == (16, 16)
    settings, _, _ = loaded(tmp_path / "out")
    assert build_space(settings).scale == pytest.approx(0.4)
    before = load_experiment(tmp_path / "student.yaml").student
    assert settings.architecture.architecture == before.architecture.architecture
    assert settings.process.learn_sigma == before.process.learn_sigma


def test_what_pipelines_in_latents_do_not_do_is_refused(tmp_path):
    make_vae(tmp_path / "vae", channels=3, shift_factor=0.1)
    keys = DIT | {"vae_path": str(tmp_path / "vae")}
    line = one_line_error(script_here(*prepared(tmp_path, keys | {"clip_denoised": True}), check=False))
    assert "DiTPipeline clips otherwise" in line
    line = one_line_error(script_here(*prepared(tmp_path, keys), check=False))
    assert "has a shift_factor" in line and not (tmp_path / "out").exists()


def test_another_vae_than_the_folders_is_refused(tmp_path):
    folder, _ = pipeline_folder(tmp_path, "LDMPipeline")
    make_vae(tmp_path / "other", channels=3)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model_path": str(folder), "vae_path": str(tmp_path / "other")}))
    line = one_line_error(
        script_here("scripts/image_sample.py", "--config", config, "--model_path", folder, check=False)
    )
    assert "vae_path is" in line and str(folder / "vqvae") in line
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vqvae"][1] == "AutoencoderKL"
