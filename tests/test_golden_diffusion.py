"""Golden group G3: schedules, respacing, every diffusion quantity, chains and losses."""

import itertools

import numpy as np
import pytest
import torch as th
from golden_data import arrays, assert_close, assert_close_to_largest, fill, manifest

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_model

FILES = manifest("g3_diffusion.json")["files"]
MEANS = {"eps": ModelMeanType.EPSILON, "xstart": ModelMeanType.START_X}
VARIANCES = {
    "learned_range": ModelVarType.LEARNED_RANGE,
    "fixed_large": ModelVarType.FIXED_LARGE,
    "fixed_small": ModelVarType.FIXED_SMALL,
}


def build(info, variant="eps_learned_range", loss="MSE"):
    mean, variance = variant.split("_", 1)
    respacing = info.get("timestep_respacing", "")
    return SpacedDiffusion(
        space_timesteps(info["steps"], respacing or [info["steps"]]),
        betas=get_named_beta_schedule(info["schedule"], info["steps"]),
        model_mean_type=MEANS[mean],
        model_var_type=VARIANCES[variance],
        loss_type=LossType[loss],
        rescale_timesteps=info.get("rescale_timesteps", False),
    )


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(("schedule", "spaced"))])
def test_schedule(name):
    diffusion = build(FILES[name])
    for key, value in arrays(FILES[name]["file"]).items():
        ours = np.asarray(getattr(diffusion, key), dtype=np.float64)
        np.testing.assert_allclose(ours, value.numpy(), rtol=1e-12, atol=0, err_msg=key)


@pytest.mark.parametrize("counts", ["0", "-5", "0,0", "10,-1"])
def test_impossible_counts_of_steps_are_refused(counts):
    with pytest.raises(ValueError, match=r"cannot keep|no step"):
        space_timesteps(100, counts)


@pytest.mark.parametrize("key, expected", manifest("g3_space_timesteps.json")["cases"].items())
def test_space_timesteps(key, expected):
    steps, counts = key.split("|")
    if expected == "ValueError":
        with pytest.raises(ValueError):
            space_timesteps(int(steps), counts)
    else:
        assert sorted(space_timesteps(int(steps), counts)) == expected


def fixed_model(output):
    return lambda x, timesteps: output


@pytest.fixture(params=[n for n in FILES if n.startswith("steps")])
def steps_case(request):
    return FILES[request.param], arrays(FILES[request.param]["file"])


def check(ours, expected, what):
    if expected.ndim == 1 and ours.ndim == 4:  # quantities that are equal over all pixels
        expected = expected.reshape(-1, 1, 1, 1).expand(ours.shape)
    if expected.abs().max() > 50:  # an unclipped x_0 at the last cosine steps
        assert_close_to_largest(ours, expected, 1e-5, what)
    else:
        assert_close(ours, expected, what=what)


def test_forward_process(steps_case):
    info, a = steps_case
    diffusion = build(info)
    assert diffusion.num_timesteps == info["num_timesteps"]
    assert_close(diffusion.q_sample(a["x_start"], a["t"], a["noise"]), a["x_t"])
    for ours, key in zip(
        diffusion.q_mean_variance(a["x_start"], a["t"]), ["mean", "variance", "log_variance"], strict=True
    ):
        check(ours, a[f"q_mean_variance/{key}"], key)
    for ours, key in zip(
        diffusion.q_posterior_mean_variance(a["x_start"], a["x_t"], a["t"]),
        ["mean", "variance", "log_variance_clipped"],
        strict=True,
    ):
        check(ours, a[f"q_posterior/{key}"], key)
    seen = diffusion.model_timesteps(a["t"])
    assert seen.dtype == a["timesteps_seen_by_model"].dtype
    assert_close(seen, a["timesteps_seen_by_model"])


def variants(a, group):
    return sorted({key.split("/")[1] for key in a if key.startswith(group + "/")})


def output_of(a, variant):
    output = a["model_output_" + variant.split("_")[0]]
    return output if variant.endswith("learned_range") else output[:, :3]


def test_reverse_process(steps_case, monkeypatch):
    info, a = steps_case
    monkeypatch.setattr(th, "randn_like", lambda x: a["step_noise"])
    compared = 0
    for variant, clip in itertools.product(variants(a, "p_mean_variance"), [True, False]):
        diffusion, model = build(info, variant), fixed_model(output_of(a, variant))
        tag = f"{variant}/clip_{clip}"
        out = diffusion.p_mean_variance(model, a["x_t"], a["t"], clip_denoised=clip)
        samples = {
            f"p_sample/{tag}": lambda d=diffusion, m=model, c=clip: d.p_sample(m, a["x_t"], a["t"], c),
            f"ddim_reverse_sample/{tag}": lambda d=diffusion, m=model, c=clip: d.ddim_reverse_sample(
                m, a["x_t"], a["t"], c
            ),
        }
        for eta in (0.0, 0.5, 1.0):
            samples[f"ddim_sample/{tag}/eta_{eta}"] = lambda d=diffusion, m=model, c=clip, e=eta: (
                d.ddim_sample(m, a["x_t"], a["t"], c, eta=e)
            )
        for key, value in out.items():
            if f"p_mean_variance/{tag}/{key}" in a:
                check(value, a[f"p_mean_variance/{tag}/{key}"], f"{tag}/{key}")
                compared += 1
        for key, draw in samples.items():
            if key in a:
                check(draw()["sample"], a[key], key)
                compared += 1
    expected = [k for k in a if k.startswith(("p_mean_variance/", "p_sample/", "ddim_"))]
    assert compared == len(expected)


def test_training_losses(steps_case):
    info, a = steps_case
    keys = [key.split("/")[1:] for key in a if key.startswith("training_losses/")]
    assert keys
    for variant, loss, term in keys:
        output = output_of(a, variant).clone().requires_grad_()
        terms = build(info, variant, loss).training_losses(
            fixed_model(output), a["x_start"], a["t"], noise=a["noise"]
        )
        expected = a[f"training_losses/{variant}/{loss}/{term}"]
        if term.startswith("grad"):
            terms["loss"].sum().backward()
            assert_close_to_largest(output.grad, expected, 1e-5, f"{variant}/{loss}/{term}")
        else:
            check(terms[term], expected, f"{variant}/{loss}/{term}")
            assert set(terms) == {k[2] for k in keys if k[:2] == [variant, loss] and "grad" not in k[2]}


class Scripted:
    """Answers each call with the next recorded output and remembers the timesteps it saw."""

    def __init__(self, outputs):
        self.outputs, self.seen = iter(outputs), []

    def __call__(self, x, timesteps):
        self.seen.append(timesteps)
        return next(self.outputs)


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("loops") and "unet" not in n])
@pytest.mark.parametrize("clip", [True, False])
def test_chains(name, clip, monkeypatch):
    info, a = FILES[name], arrays(FILES[name]["file"])
    diffusion = build(info)

    def replay(make_chain, model):
        noise = iter(a["noise_sequence"])
        monkeypatch.setattr(th, "randn_like", lambda x: next(noise))
        return make_chain(model)

    shape, start = a["initial_noise"].shape, a["initial_noise"]
    outputs = a[f"loop_model_output_sequence/clip_{clip}"]
    model = Scripted(outputs)
    chain = list(
        replay(lambda m: diffusion.p_sample_loop_progressive(m, shape, start, clip_denoised=clip), model)
    )
    assert_close(
        th.stack([out["sample"] for out in chain]), a[f"p_sample_loop/clip_{clip}/samples"], atol=1e-4
    )
    check(
        th.stack([out["pred_xstart"] for out in chain]),
        a[f"p_sample_loop/clip_{clip}/pred_xstart"],
        "pred_xstart",
    )
    assert th.equal(th.stack(model.seen), a["timesteps_seen_by_model"])
    for eta in (0.0, 0.5):
        chain = replay(
            lambda m, e=eta: list(
                diffusion.ddim_sample_loop_progressive(m, shape, start, clip_denoised=clip, eta=e)
            ),
            Scripted(outputs),
        )
        expected = a[f"ddim_sample_loop/clip_{clip}/eta_{eta}/samples"]
        check(th.stack([out["sample"] for out in chain]), expected, f"ddim eta {eta}")

    terms = replay(
        lambda m: diffusion.calc_bpd_loop(m, a["x_start"], clip_denoised=clip),
        Scripted(a["model_output_sequence"]),
    )
    for key, value in terms.items():
        check(value, a[f"calc_bpd_loop/clip_{clip}/{key}"], key)


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("loops_unet")])
def test_chains_with_a_unet(name, monkeypatch):
    info, a = FILES[name], arrays(FILES[name]["file"])
    model, diffusion = fill(create_model(**info["unet_config"])), build(info)
    conditional = info["unet_config"]["class_cond"]
    options = {
        "noise": a["initial_noise"],
        "clip_denoised": True,
        "model_kwargs": {"y": a["y"]} if conditional else None,
    }
    for key, chain in {
        "p_sample_loop/samples": lambda: diffusion.p_sample_loop_progressive(
            model, a["initial_noise"].shape, **options
        ),
        "ddim_sample_loop/eta_0.0/samples": lambda: diffusion.ddim_sample_loop_progressive(
            model, a["initial_noise"].shape, eta=0.0, **options
        ),
        "ddim_sample_loop/eta_0.5/samples": lambda: diffusion.ddim_sample_loop_progressive(
            model, a["initial_noise"].shape, eta=0.5, **options
        ),
    }.items():
        noise = iter(a["noise_sequence"])
        monkeypatch.setattr(th, "randn_like", lambda x, n=noise: next(n))
        assert_close(th.stack([out["sample"] for out in chain()]), a[key], atol=1e-4, rtol=0, what=key)


def test_likelihoods():
    a = arrays(FILES["likelihoods"]["file"])
    means, log_scales = (a[k].clone().requires_grad_() for k in ("means", "log_scales"))
    log_likelihood = discretized_gaussian_log_likelihood(a["x"], means=means, log_scales=log_scales)
    assert_close(log_likelihood, a["log_likelihood"])
    log_likelihood.sum().backward()
    for ours, key in [(means.grad, "grad_means"), (log_scales.grad, "grad_log_scales")]:
        finite = a[key].isfinite()
        assert_close_to_largest(ours[finite], a[key][finite], 1e-5, key)
    kl = normal_kl(a["kl_mean1"], a["kl_logvar1"], a["kl_mean2"], a["kl_logvar2"])
    standard = normal_kl(a["kl_mean1"], a["kl_logvar1"], 0.0, 0.0)
    for ours, key in [(kl, "normal_kl"), (standard, "normal_kl_vs_standard")]:
        finite = a[key].isfinite()
        assert th.equal(ours[~finite], a[key][~finite])
        th.testing.assert_close(ours[finite], a[key][finite], rtol=1e-4, atol=1e-5)
