"""Samplers from diffusers: they solve our ODE, on our steps, and as a user asks for them."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch as th
from in_process import script_here
from tiny import ROOT, network, one_line_error, randomise, script

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.registry import SAMPLERS, look_up
from guided_diffusion.respace import space_timesteps
from guided_diffusion.runs.weights import load_network
from guided_diffusion.sampling.solvers import make_scheduler
from guided_diffusion.script_util import build_network, create_gaussian_diffusion, create_model_and_diffusion

SOLVERS = ("dpmpp_2m", "unipc")
MEAN, STD = 0.2, 0.3
START = th.randn(2, 3, 4, 4, generator=th.Generator().manual_seed(0))


def sampling_loop(name):
    return look_up(SAMPLERS, name, "--sampler").loop


def steps_respacing(name, steps):
    return look_up(SAMPLERS, name, "--sampler").respacing(steps)


class GaussianDenoiser:
    """E[x_0 | x_t] for pixels that are normal with MEAN and STD, as a network would give it.

    Args:
        process: the original process, whose timesteps it is called with.
        predicts: "x_0", "eps" or "v".
        learn_sigma: add three channels of nonsense where the variance would be.
    """

    def __init__(self, process, predicts="x_0", learn_sigma=False):
        self.bars = th.from_numpy(process.alphas_cumprod)
        self.scale = 1000 / process.num_timesteps if process.rescale_timesteps else 1
        self.predicts, self.learn_sigma = predicts, learn_sigma
        self.timesteps = []

    def __call__(self, x, timesteps):
        self.timesteps.append(timesteps)
        bar = self.bars[(timesteps / self.scale).round().long()].reshape(-1, 1, 1, 1)
        out = MEAN + STD**2 * bar.sqrt() / (bar * STD**2 + 1 - bar) * (x.double() - bar.sqrt() * MEAN)
        if self.predicts == "eps":
            out = (x - bar.sqrt() * out) / (1 - bar).sqrt()
        elif self.predicts == "v":
            out = (bar.sqrt() * x - out) / (1 - bar).sqrt()
        if self.learn_sigma:
            out = th.cat([out, th.full_like(out, 7.0)], dim=1)
        return out.float()


def exact(process):
    """Where the ODE takes START: every x_t keeps its distance from the mean in units of its deviation.

    To t = 0, and from there by the denoiser, as every sampler's last step goes.
    """
    first, last = process.alphas_cumprod[0], process.alphas_cumprod[-1]
    units = (START.double() - last**0.5 * MEAN) / (last * STD**2 + 1 - last) ** 0.5
    x = first**0.5 * MEAN + (first * STD**2 + 1 - first) ** 0.5 * units
    return GaussianDenoiser(process)(x, th.zeros(2, dtype=th.long))


def rms(difference):
    return float(difference.double().square().mean().sqrt())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_error_falls_with_the_solvers_order(schedule):
    full = create_gaussian_diffusion(noise_schedule=schedule)
    truth = exact(full)
    errors = {}
    for sampler in ("ddim", *SOLVERS):
        for steps in (80, 320):
            process = create_gaussian_diffusion(
                noise_schedule=schedule, predict_xstart=True, timestep_respacing=str(steps)
            )
            x = sampling_loop(sampler)(
                process, GaussianDenoiser(full), START.shape, noise=START, clip_denoised=False
            )
            errors[sampler, steps] = rms(x - truth)
    order = {name: np.log2(errors[name, 80] / errors[name, 320]) / 2 for name in ("ddim", *SOLVERS)}
    assert order["ddim"] == pytest.approx(1, abs=0.05)
    assert order["dpmpp_2m"] == pytest.approx(2, abs=0.1)
    assert order["unipc"] > 2.2
    assert errors["ddim", 320] < 5e-3 and errors["dpmpp_2m", 320] < 1e-3 and errors["unipc", 320] < 6e-4


def test_the_embedded_teachers_images_become_those_of_ddim_in_many_steps():
    settings = load_experiment(ROOT / "yaml/digits_16/teacher.yaml", []).student
    model, _ = build_network(settings)
    load_network(model, ROOT / "model/digits_teacher.pt")
    noise = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(1))

    def draw(sampler, respacing):
        process = create_gaussian_diffusion(
            learn_sigma=True, noise_schedule="cosine", timestep_respacing=respacing
        )
        return sampling_loop(sampler)(process, model.eval(), noise.shape, noise=noise)

    limit = draw("ddim", "trailing100")
    for solver in SOLVERS:
        few, more = (rms(draw(solver, f"trailing{steps}") - limit) for steps in (10, 40))
        assert more < few / 2 and more < 0.04


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"predicts": "eps"},
        {"predicts": "eps", "learn_sigma": True},
        {"predicts": "eps", "rescale_timesteps": True},
        {"predicts": "x_0", "learn_sigma": True},
        {"predicts": "x_0", "rescale_timesteps": True},
    ],
)
def test_what_the_network_predicts_makes_no_difference(solver, options):
    def draw(predicts="x_0", learn_sigma=False, rescale_timesteps=False):
        process = partial(
            create_gaussian_diffusion,
            steps=100,
            noise_schedule="cosine",
            predict_xstart=predicts == "x_0",
            learn_sigma=learn_sigma,
            rescale_timesteps=rescale_timesteps,
        )
        model = GaussianDenoiser(process(), predicts, learn_sigma)
        spaced = process(timestep_respacing="trailing12")
        x = sampling_loop(solver)(spaced, model, START.shape, noise=START, clip_denoised=False)
        scale = 10 if rescale_timesteps else 1
        expected = [scale * t for t in spaced.timestep_map[::-1]]
        assert [int(t[0]) for t in model.timesteps] == expected
        return x

    th.testing.assert_close(draw(**options), draw(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("1", [99]),
        ("5", [99, 79, 59, 39, 19]),
        ("ddim5", [80, 60, 40, 20, 0]),
        ("2,1", [50, 49, 0]),
        ("", list(range(99, -1, -1))),
    ],
)
def test_the_network_sees_the_steps_asked_for(solver, flag, expected):
    respacing = steps_respacing(solver, flag)
    process = create_gaussian_diffusion(steps=100, predict_xstart=True, timestep_respacing=respacing)
    model = GaussianDenoiser(create_gaussian_diffusion(steps=100))
    x = sampling_loop(solver)(process, model, START.shape, noise=START)
    assert x.isfinite().all()
    assert [t.tolist() for t in model.timesteps] == [[t, t] for t in expected]


def test_trailing_steps():
    assert space_timesteps(20, "trailing4") == {4, 9, 14, 19}
    assert space_timesteps(20, "trailing3") == {6, 12, 19}
    for given in ("trailing", "trailing3,4", "ddimx", "10,,5", "half"):
        with pytest.raises(ValueError, match="is no respacing; give such as 50, ddim50"):
            space_timesteps(20, given)
    assert space_timesteps(20, "trailing20") == set(range(20))
    for wrong in ("trailing0", "trailing21"):
        with pytest.raises(ValueError, match="of 20 steps"):
            space_timesteps(20, wrong)
    assert [steps_respacing(sampler, "7") for sampler in SAMPLERS] == ["7", "7", "trailing7", "trailing7"]


@pytest.mark.parametrize("sampler", ["ddim", *SOLVERS])
@pytest.mark.parametrize("predicts, prediction_type", [("x_0", "sample"), ("v", "v_prediction")])
def test_a_schedule_that_ends_in_noise_alone(sampler, predicts, prediction_type):
    """From which a prediction of the noise leads nowhere, and one of x_0 or v does."""
    process = create_gaussian_diffusion(steps=20, noise_schedule="linear", prediction_type=prediction_type)
    assert process.alphas_cumprod[-1] == 0
    x = sampling_loop(sampler)(
        process, GaussianDenoiser(process, predicts), START.shape, noise=START, clip_denoised=False
    )
    assert rms(x - exact(process)) < (0.06 if sampler == "ddim" else 0.02)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scheduler_has_our_noise_levels(solver):
    process = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="trailing250")
    sigmas = (
        make_scheduler(sampling_loop(solver).keywords["scheduler_class"], process).sigmas.double().numpy()
    )
    ours = np.sqrt(1 / process.alphas_cumprod - 1)[::-1]
    np.testing.assert_allclose(sigmas, [*ours, 0], rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_and_the_last_step_are_ddims(solver):
    """Of first order, for want of a history and of a finite logarithm: one step, and 2M's two, are DDIM's."""
    for steps in (1, 2) if solver == "dpmpp_2m" else (1,):
        process = create_gaussian_diffusion(predict_xstart=True, timestep_respacing=f"trailing{steps}")
        model = GaussianDenoiser(create_gaussian_diffusion())
        ours, theirs = (
            sampling_loop(name)(process, model, START.shape, noise=START) for name in ("ddim", solver)
        )
        th.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_clipping(solver):
    """x_0 is clipped in every step if asked for, so that the last one gives an image."""
    process = create_gaussian_diffusion(timestep_respacing="trailing6")
    wild = partial(sampling_loop(solver), process, lambda x, t: -x, START.shape, noise=START)
    assert wild(clip_denoised=True).abs().max() <= 1
    assert wild(clip_denoised=False).abs().max() > 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A class-conditional tiny network: its configuration and checkpoint."""
    import yaml

    folder = tmp_path_factory.mktemp("tiny")
    keys = network(class_cond=True, num_classes=3)
    th.manual_seed(0)
    model, _ = create_model_and_diffusion(**keys)
    th.save(randomise(model).state_dict(), folder / "model.pt")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(keys))
    return folder


def sample_flags(tiny, folder, *more):
    return [
        *("scripts/image_sample.py", "--config", tiny / "tiny.yaml", "--model_path", tiny / "model.pt"),
        *("--num_samples", 5, "--timestep_respacing", 4, "--log_dir", folder, *more),
    ]


def images_of(folder):
    with np.load(folder / "samples_5x16x16x3.npz") as archive:
        return archive["arr_0"].astype(int), archive["arr_1"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_script(tiny, tmp_path, sampler):
    """Every sampler draws labelled images that depend on seed and number alone, and are its own."""
    drawn = []
    for batch in (5, 2):
        script_here(*sample_flags(tiny, tmp_path / str(batch), "--sampler", sampler, "--batch_size", batch))
        drawn.append(images_of(tmp_path / str(batch)))
    (a, labels), (b, same) = drawn
    assert np.abs(a - b).max() <= 1  # the last bit, where a batch size takes another kernel
    assert np.array_equal(labels, same)
    assert np.abs(a[0] - a[1]).max() > 1
    record = json.loads((tmp_path / "5/sampling.json").read_text())
    assert record["sampler"] == sampler
    assert record["timesteps"] == ([4, 9, 14, 19] if sampler in SOLVERS else [0, 6, 13, 19])
    other = {"dpmpp_2m": "unipc", "ancestral": "ddim"}.get(sampler, "ancestral")
    refused = one_line_error(
        script_here(*sample_flags(tiny, tmp_path / "5", "--sampler", other), check=False)
    )
    assert "holds samples drawn with another" in refused and "sampler;" in refused


def test_use_ddim_is_the_sampler_ddim(tiny, tmp_path):
    for name, flags in {"a": ["--use_ddim", "True"], "b": ["--sampler", "ddim"]}.items():
        script_here(*sample_flags(tiny, tmp_path / name, *flags))
    assert (tmp_path / "a/sampling.json").read_text() == (tmp_path / "b/sampling.json").read_text()
    assert np.array_equal(images_of(tmp_path / "a")[0], images_of(tmp_path / "b")[0])


@pytest.mark.slow
def test_two_ranks_draw_what_one_does(tiny, tmp_path):
    flags = ["--sampler", "unipc", "--batch_size", 2]
    script(*sample_flags(tiny, tmp_path / "two", *flags), ranks=2)
    script_here(*sample_flags(tiny, tmp_path / "one", *flags))
    assert np.abs(images_of(tmp_path / "two")[0] - images_of(tmp_path / "one")[0]).max() <= 1


def test_mistakes_get_one_line(tiny, tmp_path, monkeypatch):
    told = {
        "--use_ddim True means --sampler ddim, but --sampler unipc": [
            "--use_ddim",
            "True",
            "--sampler",
            "unipc",
        ],
        "--sampler ddim contradicts --use_ddim False": ["--sampler", "ddim", "--use_ddim", "False"],
        "--sampler: 'heun' is none of ancestral, ddim, dpmpp_2m, unipc": ["--sampler", "heun"],
        "--sampler: 'nowhere:HEUN' cannot be imported": ["--sampler", "nowhere:HEUN"],
        "--sampler: math:sqrt is no Sampler": ["--sampler", "math:sqrt"],
        "timestep_respacing 'trailing30': cannot keep 30 of 20 steps": [
            *("--sampler", "unipc", "--timestep_respacing", "30"),
        ],
    }
    for expected, flags in told.items():
        done = script_here(*sample_flags(tiny, tmp_path, *flags), check=False)
        assert expected in one_line_error(done)
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_unipc_multistep", None)
    monkeypatch.delitem(sys.modules, "guided_diffusion.sampling.solvers")
    done = script_here(*sample_flags(tiny, tmp_path / "new", "--sampler", "unipc"), check=False)
    assert "--sampler: 'unipc' cannot be imported: it needs pip install 'diffusers" in one_line_error(done)
    assert not (tmp_path / "new").exists()


def test_a_set_drawn_before_samplers_had_names_is_refused(tiny, tmp_path):
    script_here(*sample_flags(tiny, tmp_path))
    record = json.loads((tmp_path / "sampling.json").read_text())
    del record["sampler"]
    (tmp_path / "sampling.json").write_text(json.dumps(record | {"use_ddim": False}))
    done = script_here(*sample_flags(tiny, tmp_path), check=False)
    assert "drawn with another sampler; choose another --log_dir or --name" in one_line_error(done)


def test_help_imports_neither_torch_nor_diffusers():
    done = script("scripts/image_sample.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert "dpmpp_2m" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "diffusers"}
