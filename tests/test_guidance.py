"""Classifier-free guidance: of teachers, whose guided prediction is distilled, and in sampling."""

import json

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from test_foreign import (
    SCHEDULE,
    STUDENTS,
    DDIMScheduler,
    diffusers,
    distillation_config,
    dit,
    loaded,
    save,
    unet,
)
from tiny import denoiser, distillation, make_vae, network, one_line_error, randomise

from guided_diffusion.config.loading import load_distillation, load_experiment
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.pool_file import read_pool_header
from guided_diffusion.distill.teacher import Teacher
from guided_diffusion.io.description import described
from guided_diffusion.io.safetensors_file import read_safetensors
from guided_diffusion.networks.guidance import guided
from guided_diffusion.runs.weights import load_state_dict
from guided_diffusion.sampling.samplers import sample_images
from guided_diffusion.script_util import build_network, build_process, build_space
from guided_diffusion.setups.distillation import load_teacher
from guided_diffusion.spaces import PixelSpace

CLASSES = {"class_cond": True, "num_classes": 5}
SMALL = {"image_size": 8, "diffusion_steps": 20, "noise_schedule": "cosine", **CLASSES}
KINDS = {
    "adm": network(8, 16, **CLASSES, null_class=True),
    "adm of v": network(8, 16, **CLASSES, null_class=True, prediction_type="v_prediction"),
    "diffusers_unet2d": STUDENTS["CNN"] | SMALL | {"block_out_channels": "16,16", "null_class": True},
    "dit": STUDENTS["ViT"] | SMALL | {"learn_sigma": True},
}
SAMPLERS = ["ancestral", "ddim", "dpmpp_2m", "unipc"]


def made(kind, **more):
    """A random network and its process."""
    th.manual_seed(0)
    model, process = build_network(denoiser(**KINDS[kind], **more))
    return randomise(model).eval(), process


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_guided_noise(kind):
    """By hand: eps(null) + w (eps(y) - eps(null)), the variance of y; one call of twice the batch."""
    model, process = made(kind)
    th.manual_seed(1)
    x, t, y = th.randn(3, 3, 8, 8), th.tensor([0, 7, 19]), th.tensor([0, 2, 4])
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("forward"))
    evaluate = model.evaluate
    model.evaluate = lambda x, *args, **more: calls.append(len(x)) or evaluate(x, *args, **more)
    th.manual_seed(2)
    step = Teacher(guided(model, 3.0), process, PixelSpace(8)).step(x, t, y, features=True)
    assert calls == [6]
    with th.no_grad():
        own, null = (evaluate(x, process.model_timesteps(t), labels) for labels in (y, th.full_like(y, 5)))
    eps, eps_null = (process.predict_eps(x, t, out.output[:, :3]) for out in (own, null))
    expected = eps_null + 3.0 * (eps - eps_null)
    assert (eps - eps_null).abs().max() > 1e-3
    th.testing.assert_close(step.eps, expected, rtol=1e-4, atol=1e-4)
    x_0 = process.clipped_xstart(x, t, expected)
    mean = process.q_posterior_mean_variance(x_0, x, t)[0]
    th.testing.assert_close(step.mean, mean, rtol=1e-4, atol=1e-4)
    plain = process.p_distribution(own.output, x, t)
    th.testing.assert_close(step.log_variance, plain["log_variance"])
    th.testing.assert_close(step.features, own.features)
    hop = Teacher(guided(model, 3.0), process, PixelSpace(8)).step(x, t, y, s=th.tensor([-1, 3, 9]))
    th.testing.assert_close(hop.eps, step.eps)


@pytest.mark.parametrize("kind", ["adm", "dit"])
def test_a_scale_of_one_is_the_plain_prediction_and_zero_none(kind):
    model, process = made(kind)
    x, t, y = th.randn(2, 3, 8, 8), th.tensor([3, 12]), th.tensor([1, 2])
    with th.no_grad():
        th.testing.assert_close(guided(model, 1.0)(x, t, y), model(x, t, y))
    assert guided(model, 0.0) is model
    jumps = []
    for scale in (0.0, 1.0, 4.0):
        th.manual_seed(3)
        jumps.append(Teacher(guided(model, scale), process, PixelSpace(8)).jump(x, t, t - 2, y))
    th.testing.assert_close(jumps[0], jumps[1])
    assert (jumps[2] - jumps[0]).abs().max() > 1e-3


def test_sampling_is_that_of_dit_pipeline(tmp_path):
    """Equal noise, all channels guided by diffusers' own pipeline; its null class is always 1000."""
    vae = make_vae(tmp_path / "vae", channels=4, scaling_factor=0.5)
    model = dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    pipeline = diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "dit")
    labels = [7, 999]
    images = {
        scale: pipeline(labels, scale, th.Generator().manual_seed(3), 5, output_type="np").images
        for scale in (1.0, 6.0)
    }
    settings, net, _ = loaded(tmp_path / "dit")
    process = build_process(settings, "timestep_respacing", "ddim5")
    noise = th.randn(2, 4, 8, 8, generator=th.Generator().manual_seed(3))
    with th.no_grad():
        x = process.ddim_sample_loop(
            guided(net, 6.0), noise.shape, noise=noise, model_kwargs={"y": th.tensor(labels)}
        )
    ours = (build_space(settings).pixels(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(images[6.0] - images[1.0]).max() > 1e-2
    assert np.abs(ours - images[6.0]).max() < 1e-4


def test_a_guided_teacher_is_distilled_to_samples(tmp_path):
    """Through the scripts: pool, target and chain are the guided ones; no label is the null class."""
    model = dit(out_channels=6, num_embeds_ada_norm=5)
    folder = save(tmp_path / "teacher", model, DDIMScheduler(**SCHEDULE))
    config = distillation_config(tmp_path, folder, STUDENTS["CNN"], guidance_scale=4.0)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    pool = tmp_path / "pool.cache"
    assert read_pool_header(pool)["guidance_scale"] == 4.0
    assert int(read_safetensors(pool)["total_y"].max()) < 5
    teacher = load_teacher(load_distillation(config), folder)
    assert teacher.network.scale == 4.0
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run")
    weights = tmp_path / "run/ema_0.9_000004.pt"
    assert load_state_dict(weights)["class_embedding.weight"].shape[0] == 5  # no null class: evaluated once
    flags = ["--model_path", weights, "--num_samples", 4, "--timestep_respacing", 2]
    script_here("scripts/image_sample.py", *flags, "--log_dir", tmp_path / "s")
    with np.load(tmp_path / "s/samples_4x8x8x3.npz") as samples:
        assert samples["arr_1"].max() < 5
    guidance = ["--guidance_scale", 2, "--log_dir", tmp_path / "g"]
    line = one_line_error(script_here("scripts/image_sample.py", *flags, *guidance, check=False))
    assert "--guidance_scale" in line and "null class" in line
    # A pool of another guidance, or of none, is another pool.
    for scale, theirs in ((0.0, "4.0"), (2.0, "4.0")):
        done = script_here("scripts/image_kd.py", "--config", config, f"teacher.guidance_scale={scale}",
                           "--exp_dir", tmp_path / f"other{scale}", check=False)  # fmt: skip
        assert f"guidance_scale {theirs}" in one_line_error(done)


def test_sampling_leaves_a_guided_teacher_as_it_was():
    """Not in training mode, in which it would drop activations and labels."""
    model, process = made("adm")
    teacher = guided(model, 2.0)
    sample_images(teacher, process, PixelSpace(8), range(1))
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("probability, warned", [(0.0, True), (0.1, False)])
def test_a_teachers_null_class_that_was_not_trained_is_told(tmp_path, probability, warned):
    config = distillation(tmp_path, 8, **CLASSES, teacher__null_class=True, teacher__guidance_scale=2.0)
    said = {"architecture": {"class_dropout_prob": probability}}
    th.save(described(load_state_dict(tmp_path / "teacher.pt"), said), tmp_path / "teacher.pt")
    done = script_here("scripts/dynamic_prepare.py", "--config", config)
    assert ("a null class that was not trained" in done.stderr) == warned


def test_a_pool_of_before_is_one_without_guidance(tmp_path):
    config = distillation(tmp_path, 8, **CLASSES, teacher__null_class=True)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    assert "guidance_scale" not in read_pool_header(tmp_path / "pool.cache")
    done = script_here(
        "scripts/dynamic_prepare.py", "--config", config, "teacher.guidance_scale=2", check=False
    )
    assert "guidance_scale none, this run has 2.0" in one_line_error(done)


def test_every_sampler_is_guided_and_says_so(tmp_path):
    """A U-Net whose last label is the null class, by every sampler; recorded, and not mixed with others."""
    model = unet(num_class_embeds=6)
    folder = save(tmp_path / "teacher", model, DDIMScheduler(**SCHEDULE))
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"model_path": str(folder), "null_class": True}))
    settings = load_experiment(config).student.architecture
    assert (settings.num_classes, settings.null_class) == (5, True)
    flags = ["--config", config, "--model_path", folder, "--num_samples", 8, "--timestep_respacing", 3]
    for sampler in SAMPLERS:
        drawn = {}
        for scale in (0, 1, 5):
            out = tmp_path / f"{sampler}{scale}"
            script_here("scripts/image_sample.py", *flags, "--sampler", sampler, "--guidance_scale", scale,
                        "--log_dir", out)  # fmt: skip
            with np.load(out / "samples_8x8x8x3.npz") as samples:
                drawn[scale] = samples["arr_0"].astype(int)
                assert samples["arr_1"].max() < 5
                told = json.loads(str(samples["provenance"]))
            recorded = json.loads((out / "sampling.json").read_text())
            assert recorded["guidance_scale"] == (scale or None)
            assert told["guidance_scale"] == (scale or None)
        assert np.abs(drawn[1] - drawn[0]).max() <= 1 and np.abs(drawn[5] - drawn[0]).max() > 5
    done = script_here("scripts/image_sample.py", *flags, "--guidance_scale", 2, "--log_dir",
                       tmp_path / "ancestral0", check=False)  # fmt: skip
    assert "another guidance_scale" in one_line_error(done)


REFUSED = {
    "no classes": ({}, 2, "teacher.guidance_scale: guidance needs"),
    "no null class": (CLASSES, 2, "teacher.guidance_scale: guidance needs"),
    "negative": (CLASSES, -1, "teacher.guidance_scale must be 0 or more"),
    "no number": (CLASSES, "nan", "teacher.guidance_scale must be 0 or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_guided_is_refused(tmp_path, name):
    keys, scale, line = REFUSED[name]
    config = distillation(tmp_path, 8, **keys)
    flags = ["--config", config, f"teacher.guidance_scale={scale}"]
    assert line in one_line_error(script_here("scripts/dynamic_prepare.py", *flags, check=False))


def test_labels_of_a_pool_are_never_the_null_class():
    model, _ = made("adm")
    assert model.label_emb.num_embeddings == 6 and model.num_classes == 5
    pool = DynamicBatch.of_noise(500, model.shape, 20, guided(model, 2.0).num_classes)
    assert set(pool.y.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["adm", "diffusers_unet2d", "dit"])
def test_a_label_is_dropped_in_training_alone(kind):
    """So that baselines train what guidance needs."""
    model, _ = made(kind, class_dropout_prob=0.5)
    y = th.arange(1000) % 5
    assert th.equal(model.labels(y), y)
    dropped = model.train().labels(y) == 5
    assert 0.4 < dropped.float().mean() < 0.6
    with pytest.raises(Exception, match="class_dropout_prob"):
        denoiser(**network(8, **CLASSES, class_dropout_prob=0.1)).check("")
