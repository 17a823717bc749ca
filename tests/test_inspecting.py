"""What a checkpoint is, found out from what it says and from its shapes."""

import os
import re
import subprocess
import sys

import pytest
import torch as th
import yaml
from in_process import script_here
from safetensors.torch import save_file
from test_foreign import SCHEDULE, DDIMScheduler, adm_unet, save, unet
from test_foreign_latents import pipeline_folder
from test_weight_files import Trap, ldm, lightning  # noqa: F401 (a fixture)
from tiny import ROOT, denoiser, distillation, network, one_line_error, randomise, script

from guided_diffusion.config.adm_shapes import adm_settings, common_keys, known_like, shown_by
from guided_diffusion.config.known_models import KNOWN_MODELS
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.settings import flat
from guided_diffusion.io.description import described
from guided_diffusion.runs.weights import load_network
from guided_diffusion.script_util import build_network

SCRIPT = "scripts/inspect_checkpoint.py"
HIDDEN = ("image_size", "num_heads", "use_new_attention_order", "diffusion_steps", "noise_schedule")
ARCHITECTURES = sorted(p for p in ROOT.glob("yaml/arch/*.yaml") if "DiT" not in p.stem)


def build_shapes(settings):
    with th.device("meta"):
        model, _ = build_network(settings)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def saved(tmp_path, keys, name="network.pt"):
    """A random network's file."""
    th.manual_seed(0)
    model = randomise(build_network(denoiser(**keys))[0])
    th.save(model.state_dict(), tmp_path / name)
    return tmp_path / name


def found(tmp_path, *args):
    """The settings that come of what the script prints, in a file; and what it says beside that."""
    done = script_here(SCRIPT, *args)
    config = tmp_path / "inspected.yaml"
    config.write_text(done.stdout)
    return load_experiment(config).student, done.stderr


def told(keys):
    """The overrides by which a network's hidden keys are given."""
    flags = {name: keys[name] for name in HIDDEN if name in keys}
    return [f"{name}={value}" for name, value in ({"use_new_attention_order": False} | flags).items()]


def trained_as(settings):
    """The keys of an architecture and a process that weights and chain depend on."""
    free = ("dropout", "use_checkpoint", "use_fp16", "timestep_respacing", "num_heads_upsample")
    keys = flat(settings.architecture) | flat(settings.process)
    keys = {name: value for name, value in keys.items() if name not in free}
    if keys.get("num_head_channels", -1) != -1:
        del keys["num_heads"]
    return keys


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda p: p.stem)
def test_shapes_tell_every_ready_architecture(path):
    """Of the process that goes with it, without the weights being made."""
    data = {"-LDM": "celebahq_256", "CelebA": "celeba_64", "digits-": "digits_16", "digits32": "digits_32"}
    folder = next((name for part, name in data.items() if part in path.stem), "cifar10_32")
    process = (ROOT / f"yaml/{folder}/diffusion.yaml").read_text()
    keys = yaml.safe_load(path.read_text()) | yaml.safe_load(process)
    scale = keys.pop("vae_scale", None)
    settings = denoiser(**{k: v for k, v in keys.items() if k != "vae_path"})
    shapes = build_shapes(settings)
    shown = shown_by(shapes)
    known = known_like(shown)
    assert known
    hidden = common_keys(known)
    assert hidden.pop("vae_scale", None) == scale
    again = denoiser(**adm_settings(shown, hidden))
    assert build_shapes(again) == shapes
    ours, theirs = trained_as(again), trained_as(settings)
    ours["channel_mult"] = theirs["channel_mult"] = theirs["channel_mult"] or ours["channel_mult"]
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=lambda m: m.name)
def test_every_known_model_is_known_by_its_shapes(model):
    keys = {k: v for k, v in model.keys.items() if k != "vae_scale"}
    alike = known_like(shown_by(build_shapes(denoiser(**keys))))
    assert model in alike
    assert all(common_keys(alike) == dict(other.keys) for other in alike)  # equal shapes, nothing in doubt


@pytest.mark.parametrize(
    "name, millions",  # in millions, as published beside the checkpoints of "Diffusion Models Beat GANs"
    [("64x64", 296), ("128x128", 422), ("256x256", 554), ("512x512", 559)],
)
def test_adm_has_the_published_sizes(name, millions):
    model = next(m for m in KNOWN_MODELS if m.file == f"{name}_diffusion.pt")
    shapes = build_shapes(denoiser(**model.keys))
    count = sum(th.Size(shape).numel() for shape in shapes.values())
    assert round(count / 1e6) == millions


VARIANTS = {
    "as ADM": {},
    "no learned variance, by convolutions": {"learn_sigma": False, "resblock_updown": False},
    "conditions added": {"use_scale_shift_norm": False},
    "classes": {"class_cond": True, "num_classes": 7},
    "three levels": {"channel_mult": "1,2,3", "num_res_blocks": 2, "attention_resolutions": "16,4"},
    "one level": {"channel_mult": "2", "attention_resolutions": "16", "resblock_updown": False},
    "no attention but in the middle": {"attention_resolutions": ""},
    "half a width": {"channel_mult": "0.5,1"},
    "by convolutions, one block, all levels": {"resblock_updown": False, "attention_resolutions": "16,8"},
    "new order": {"use_new_attention_order": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_unet_nobody_knows_is_told_but_for_what_shapes_hide(tmp_path, name):
    keys = network(16, 32, **VARIANTS[name])
    path = saved(tmp_path, keys)
    settings, stderr = found(tmp_path, path, *told(keys), "--check")
    assert trained_as(settings) == trained_as(denoiser(**keys)), stderr
    assert "an ADM U-Net" in stderr and "loads strictly; its first step from noise is finite" in stderr
    assert build_shapes(settings) == build_shapes(denoiser(**keys))
    line = one_line_error(script_here(SCRIPT, path, check=False))
    for hidden in ("image_size=N", "num_head_channels=N (or num_heads=N)", "noise_schedule=linear|cosine"):
        assert hidden in line


def test_a_null_class_is_told_by_the_user(tmp_path):
    keys = network(16, 32, class_cond=True, num_classes=6, null_class=True)
    path = saved(tmp_path, keys)
    settings, stderr = found(tmp_path, path, *told(keys))
    assert settings.architecture.num_classes == 7 and "null_class=true if the last means no class" in stderr
    settings, _ = found(tmp_path, path, *told(keys), "null_class=true", "--check")
    assert (settings.architecture.num_classes, settings.architecture.null_class) == (6, True)


def test_the_embedded_teacher_needs_nothing_and_samples(tmp_path):
    """As a user does it, and the same from a .safetensors file and from a TCCD student of its shapes."""
    teacher = ROOT / "model/digits_teacher.pt"
    done = script(SCRIPT, teacher, "--check")
    (tmp_path / "c.yaml").write_text(done.stdout)
    assert "the embedded digits teacher" in done.stderr
    flags = ["--config", tmp_path / "c.yaml", "--model_path", teacher, "--num_samples", 2]
    script_here("scripts/image_sample.py", *flags, "--timestep_respacing", 2, "--log_dir", tmp_path / "s")
    assert (tmp_path / "s/samples_2x16x16x3.npz").is_file()
    settings = load_experiment(ROOT / "yaml/digits_16/teacher.yaml").student
    assert trained_as(load_experiment(tmp_path / "c.yaml").student) == trained_as(settings)
    state = th.load(teacher, weights_only=True)
    save_file(state, tmp_path / "network.safetensors")
    again, _ = found(tmp_path, tmp_path / "network.safetensors")
    assert trained_as(again) == trained_as(settings)
    th.save(state | {"out_embed.cls_token": th.ones(1, 1, 128)}, tmp_path / "student.pt")
    again, stderr = found(tmp_path, tmp_path / "student.pt", "--check")
    assert trained_as(again) == trained_as(settings) and "a student of the original TCCD's" in stderr


def test_a_run_and_its_checkpoints_say_it_themselves(tmp_path):
    config = distillation(tmp_path, 8, run__weights_format="both")
    script_here("scripts/dynamic_prepare.py", "--config", config)
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.iterations=4")
    expected = trained_as(load_experiment(config).student)
    for name in ("run", "run/model000004.pt", "run/ema_0.9_000004.safetensors"):
        settings, stderr = found(tmp_path, tmp_path / name, "--check")
        assert trained_as(settings) == expected
        assert "of configuration tiny, which it says itself" in stderr
        assert name != "run" or "of its newest checkpoint ema_0.99_000004.pt" in stderr


def test_a_latent_diffusion_model(ldm, tmp_path):  # noqa: F811
    settings, _, average, state = ldm
    path = tmp_path / "model.ckpt"
    th.save(lightning(state), path)
    hidden = ["image_size=8", "num_head_channels=16", "diffusion_steps=20", "noise_schedule=scaled_linear"]
    betas = ["beta_start=0.0015", "beta_end=0.0195"]
    line = one_line_error(script_here(SCRIPT, path, *hidden, check=False))
    assert "a latent diffusion model of CompVis'" in line and "vae_path=DIR" in line
    assert "use_new_attention_order" not in line
    again, stderr = found(tmp_path, path, *hidden, *betas, f"vae_path={tmp_path / 'vae'}", "--check")
    assert flat(again) == flat(settings)
    assert "averaged weights (model_ema) are taken" in stderr
    model, _ = build_network(again)
    load_network(model, path)
    assert th.equal(model.out[2].weight, average.out[2].weight)


FOLDERS = {
    "adm": lambda p: save(p, adm_unet(), DDIMScheduler(**SCHEDULE)),
    "diffusers_unet2d": lambda p: save(p, unet(num_class_embeds=5), DDIMScheduler(**SCHEDULE)),
    "dit": lambda p: pipeline_folder(p, "DiTPipeline")[0],
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_diffusers(tmp_path, name):
    folder = FOLDERS[name](tmp_path / "model")
    settings, stderr = found(tmp_path, folder, "--check")
    assert settings.architecture.architecture == name and f"architecture {name}" in stderr
    config = tmp_path / "folder.yaml"
    config.write_text(yaml.safe_dump({"model_path": str(folder)}))
    expected = flat(load_experiment(config).student)
    assert {k: v for k, v in flat(settings).items() if expected[k] != v} == {"model_path": ""}
    flags = ["--config", tmp_path / "inspected.yaml", "--model_path", folder, "--num_samples", 2]
    script_here("scripts/image_sample.py", *flags, "--timestep_respacing", 2, "--log_dir", tmp_path / "s")


def test_a_bare_folder_asks_for_its_process(tmp_path):
    folder = save(tmp_path / "unet", unet())
    assert "noise_schedule" in one_line_error(script_here(SCRIPT, folder, check=False))
    settings, _ = found(tmp_path, folder, "noise_schedule=cosine", "--check")
    assert settings.process.noise_schedule == "cosine"


def bad_files(tmp_path):
    keys = network(16, 32)
    state = build_network(denoiser(**keys))[0].state_dict()
    keys_of_architecture = flat(denoiser(**keys).architecture)
    crossed = {"input_blocks.1.1.transformer_blocks.0.norm1.weight": th.ones(4)}
    return {
        "a pickle that would run": (Trap(tmp_path / "trapped"), "refused, nothing in it was run"),
        "no state dict": ([1, 2], "holds no state dict"),
        "nothing": ({}, "is no network that is known here; it holds nothing"),
        "another network": ({"fc.weight": th.ones(2, 2)}, "it holds fc.weight"),
        "of diffusers without its folder": (unet().state_dict(), "name the folder that has its config.json"),
        "text to image": (crossed, "cross-attention"),
        "a layer missing": (
            {k: v for k, v in state.items() if k != "middle_block.1.norm.weight"},
            "1 missing .middle_block.1.norm.weight",
        ),
        "widths that do not fit": (
            state | {"middle_block.0.in_layers.2.weight": th.ones(3, 64, 3, 3)},
            "1 of another shape",
        ),
        "no width at all": (state | {"time_embed.0.weight": th.ones(128, 0)}, "is no network"),
        "a width of nothing": (
            state | {"input_blocks.1.0.out_layers.3.weight": th.ones(2**20, 0, 3, 3)},
            "is no network",
        ),
        "absurd sizes": (
            described(state, {"architecture": keys_of_architecture | {"num_channels": 10**13}}),
            "configuration: ",
        ),
        "flat": (state | {"time_embed.0.weight": th.ones(3)}, "is no network"),
        "a damaged description": (described(state, {"architecture": 3}), "damaged"),
        "a foreign architecture": (
            described(state, {"architecture": {"architecture": "os:system"}}),
            "which is not built in",
        ),
    }


def test_what_is_no_network_is_told_in_one_line(tmp_path):
    for name, (content, line) in bad_files(tmp_path).items():
        th.save(content, tmp_path / "file.pt")
        done = script_here(SCRIPT, tmp_path / "file.pt", *told(network(16, 32)), check=False)
        assert re.search(line, one_line_error(done)), (name, done.stderr)
        assert done.stdout == "" and not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["image_size=tall"], "image_size must be a whole number, not 'tall'"),
        (["image_size=15"], "cannot be halved"),
        (["num_heads=5"], "does not divide"),
        (["noise_schedule=square"], "noise_schedule must be"),
        (["num_channels=64"], "does not fit the configured network"),
        (["noise_shedule=cosine"], "unknown key 'noise_shedule'"),
        (["cosine"], "is no override"),
    ],
)
def test_mistaken_overrides_are_told_in_one_line(tmp_path, overrides, line):
    keys = network(16, 32)
    path = saved(tmp_path, keys)
    done = script_here(SCRIPT, path, *told(keys), *overrides, check=False)
    assert line in one_line_error(done) and done.stdout == ""


def test_a_step_that_is_not_finite_fails(tmp_path):
    keys = network(16, 32)
    path = saved(tmp_path, keys)
    state = th.load(path)
    state["out.2.bias"][0] = th.nan
    th.save(state, path)
    found(tmp_path, path, *told(keys))
    done = script_here(SCRIPT, path, *told(keys), "--check", check=False)
    assert "not finite" in one_line_error(done) and done.stdout == ""


def test_a_missing_known_teacher_says_where_it_comes_from(tmp_path):
    config = ROOT / "yaml/cifar10_32/exp/CIFAR10-14M-TCCD-0.4.yaml"
    flags = ["--config", config, "teacher.model_path=nowhere/32x32_diffusion_cifar10.pt"]
    line = one_line_error(script_here("scripts/dynamic_prepare.py", *flags, check=False))
    assert "ADM_cifar10_baseline.pt of DDPM-IP" in line and "model/README.md" in line
    line = one_line_error(script_here(SCRIPT, tmp_path / "DDPM_IP_celeba64.pt", check=False))
    assert "DDPM_IP_celeba64.pt of DDPM-IP" in line
    assert "no such file" in one_line_error(script_here(SCRIPT, tmp_path / "mine.pt", check=False))
    line = one_line_error(script_here(SCRIPT, "mine.pt", check=False))
    assert f"no such file: mine.pt in {os.getcwd()}" in line
    readme = (ROOT / "model/README.md").read_text()
    for path in ROOT.glob("yaml/*/distill.yaml"):
        file = yaml.safe_load(path.read_text())["teacher"]["model_path"].removeprefix("model/")
        assert file in readme and file in [model.file for model in KNOWN_MODELS]


def test_a_reader_that_is_gone_ends_it_quietly():
    """As `inspect_checkpoint.py … | head` does."""
    command = [sys.executable, ROOT / "scripts/inspect_checkpoint.py", ROOT / "model/digits_teacher.pt"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert done.returncode == 1
    assert "an ADM U-Net" in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
