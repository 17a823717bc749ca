"""The process keys that other people's teachers need, against diffusers' own schedulers."""

import numpy as np
import pytest
import torch as th
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from tiny import denoiser

from guided_diffusion.losses import normal_kl
from guided_diffusion.script_util import build_process, create_gaussian_diffusion

KEYS = {"image_size": 8, "num_channels": 32, "channel_mult": "1", "attention_resolutions": "8"}


@pytest.mark.parametrize(
    "schedule, start, end",
    [("linear", 0.0001, 0.02), ("scaled_linear", 0.0015, 0.0195), ("scaled_linear", 0.00085, 0.012)],
)
def test_beta_ranges(schedule, start, end):
    settings = denoiser(**KEYS, noise_schedule=schedule, beta_start=start, beta_end=end, diffusion_steps=200)
    theirs = DDPMScheduler(200, beta_schedule=schedule, beta_start=start, beta_end=end)
    np.testing.assert_allclose(build_process(settings, "").betas, theirs.betas.double().numpy(), rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_the_reverse_step(prediction, small, clip):
    settings = denoiser(
        **KEYS, prediction_type=prediction, sigma_small=small, clip_denoised=clip, beta_start=0.001
    )
    process = build_process(settings, "")
    theirs = DDPMScheduler(
        1000, beta_start=0.001, prediction_type=prediction, clip_sample=clip,
        variance_type="fixed_small" if small else "fixed_large",
    )  # fmt: skip
    x, output = th.randn(2, 5, 3, 8, 8, generator=th.Generator().manual_seed(0))
    for i, t in enumerate([0, 1, 300, 700, 999]):
        ours = process.p_distribution(output[i : i + 1], x[i : i + 1], th.tensor([t]))
        step = theirs.step(output[i : i + 1], t, x[i : i + 1], generator=th.Generator().manual_seed(1))
        noise = th.randn(1, 3, 8, 8, generator=th.Generator().manual_seed(1))
        th.testing.assert_close(ours["pred_xstart"], step.pred_original_sample, atol=1e-4, rtol=1e-4)
        spread = (0.5 * ours["log_variance"]).exp() * noise * (t > 0)
        th.testing.assert_close(ours["mean"] + spread, step.prev_sample, atol=1e-4, rtol=1e-3)
        eps = process.predict_eps(x[i : i + 1], th.tensor([t]), output[i : i + 1])
        x_0 = process.predict_xstart_from_eps(x[i : i + 1], th.tensor([t]), eps)
        unclipped = create_gaussian_diffusion(
            prediction_type=prediction, beta_start=0.001, clip_denoised=False
        )
        told = unclipped.p_distribution(output[i : i + 1], x[i : i + 1], th.tensor([t]))["pred_xstart"]
        th.testing.assert_close(x_0, told, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_model_has_no_loss(prediction):
    process = create_gaussian_diffusion(prediction_type=prediction)
    x_0, noise = th.randn(2, 4, 3, 4, 4)
    t = th.tensor([0, 100, 500, 999])
    bar = process.at("alphas_cumprod", t)
    answer = {"epsilon": noise, "sample": x_0, "v_prediction": bar.sqrt() * noise - (1 - bar).sqrt() * x_0}
    terms = process.training_losses(lambda x, t: answer[prediction], x_0, t, noise=noise)
    assert terms["loss"].max() < 1e-10


def test_a_prediction_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="epsilon, sample, v_prediction, not 'x0'"):
        create_gaussian_diffusion(prediction_type="x0")


@pytest.mark.parametrize("given, steps", [(None, 1000), ([], 1000), ("", 1000), (10, 10), ([10, 15, 20], 45)])
def test_respacing_is_said_in_every_form_that_adm_takes(given, steps):
    assert create_gaussian_diffusion(timestep_respacing=given).num_timesteps == steps


def test_ddim_with_full_noise_is_finite_though_rounding_takes_its_last_factor_below_zero():
    process = create_gaussian_diffusion(steps=4000, noise_schedule="cosine", timestep_respacing="20")
    last, noise = th.tensor([19]), th.ones(1, 3, 4, 4)
    assert process.ddim_sample(lambda x, t: 0.5 * x, noise, last, eta=1.0)["sample"].isfinite().all()


def test_samplers_take_noise_and_clipping_in_adms_order():
    process, noise = create_gaussian_diffusion(timestep_respacing="4"), th.randn(1, 3, 4, 4)
    for loop in (process.ddim_sample_loop, process.p_sample_loop):
        ends = []
        for args, named in (((noise, False), {}), ((), {"noise": noise, "clip_denoised": False})):
            th.manual_seed(0)
            ends.append(loop(lambda x, t: 0.5 * x, noise.shape, *args, device="cpu", **named))
        assert th.equal(*ends)


def test_the_way_to_noise_knows_no_noise_of_its_own():
    process, x = create_gaussian_diffusion(timestep_respacing="4"), th.randn(1, 3, 4, 4)
    assert (
        process.ddim_reverse_sample(lambda x, t: 0.5 * x, x, th.tensor([1]), eta=0.0)["sample"]
        .isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="eta must be 0"):
        process.ddim_reverse_sample(lambda x, t: 0.5 * x, x, th.tensor([1]), eta=0.5)


def test_either_gaussian_of_a_divergence_may_be_numbers():
    mean, log_variance = th.randn(2, 3, 4)
    zeros = th.zeros(3, 4)
    assert th.equal(normal_kl(0.0, 0.0, mean, log_variance), normal_kl(zeros, zeros, mean, log_variance))
    assert th.equal(normal_kl(mean, 0.0, 0.0, log_variance), normal_kl(mean, zeros, zeros, log_variance))
