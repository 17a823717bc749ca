"""docs/extending.md: its code, written to files, is used as it says."""

import re
import sys

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from tiny import ROOT, denoiser, distillation, one_line_error

from guided_diffusion.config.registry import SAMPLERS, look_up
from guided_diffusion.errors import UserError
from guided_diffusion.io.description import read_description
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import load_state_dict
from guided_diffusion.script_util import build_network, create_gaussian_diffusion

PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The page's Python files, importable, and its YAML pieces."""
    folder = tmp_path_factory.mktemp("extensions")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(code)
    sys.path.insert(0, str(folder))
    yield {
        next(iter(piece)): piece
        for piece in map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
    }
    sys.path.remove(str(folder))


def with_keys(config, section, keys):
    """A configuration with the page's keys; a student of another architecture loses ADM's."""
    tree = yaml.safe_load(config.read_text())
    if "architecture" in keys:
        adm = ("num_channels", "num_res_blocks", "num_heads", "attention_resolutions", "channel_mult")
        for name in (*adm, "use_scale_shift_norm", "resblock_updown"):
            del tree[section][name]
    tree[section] = tree.get(section, {}) | keys
    config.write_text(yaml.safe_dump(tree))
    return config


def test_a_network_is_distilled_to_resumed_and_sampled_from(modules, tmp_path):
    config = with_keys(distillation(tmp_path), "student", modules["student"]["student"])
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run"]
    script_here(*flags, "run.iterations=4", "run.sample_interval=0", "run.num_samples=2")
    script_here(*flags, "run.iterations=6")
    straight = [*flags[:-1], tmp_path / "straight", "run.iterations=6"]
    script_here(*straight)
    weights = tmp_path / "run/model000006.pt"
    assert read_description(weights)["architecture"]["width"] == 16
    same = load_state_dict(tmp_path / "straight/model000006.pt")
    assert all(th.equal(value, same[name]) for name, value in load_state_dict(weights).items())
    sample = ["scripts/image_sample.py", "--config", config, "--model_path", weights]
    sample += ["--num_samples", 3, "--timestep_respacing", 2, "--log_dir", tmp_path / "samples"]
    resolved = tmp_path / "student.yaml"
    resolved.write_text(yaml.safe_dump(yaml.safe_load(config.read_text())["student"]))
    sample[2] = resolved
    script_here(*sample, "--sampler", "my_samplers:HEUN")
    with np.load(tmp_path / "samples/samples_3x16x16x3.npz") as samples:
        assert samples["arr_0"].shape == (3, 16, 16, 3)
    assert "width 16, but width is 8" in one_line_error(script_here(*sample, "width=8", check=False))


def test_a_network_is_a_teacher(modules, tmp_path):
    config = with_keys(distillation(tmp_path), "teacher", modules["student"]["student"])
    from my_networks import ConvNet

    th.manual_seed(0)
    th.save(ConvNet(16, (3, 16, 16), 6).state_dict(), tmp_path / "teacher.pt")
    script_here("scripts/dynamic_prepare.py", "--config", config)
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.iterations=1")
    labelled = ["teacher.class_cond=true", "teacher.num_classes=5", f"teacher.tempfile={tmp_path}/5.cache"]
    done = script_here("scripts/dynamic_prepare.py", "--config", config, *labelled, check=False)
    assert "teacher.architecture: my_networks:ConvNet is built for no classes" in one_line_error(done)


def test_an_objective_reads_the_teachers_features_from_its_one_evaluation(modules, tmp_path, monkeypatch):
    from guided_diffusion.unet import UNetModel

    config = with_keys(distillation(tmp_path), "distill", modules["distill"]["distill"])
    script_here("scripts/dynamic_prepare.py", "--config", config)
    calls, evaluate = [], UNetModel.evaluate
    monkeypatch.setattr(
        UNetModel, "evaluate", lambda self, *a, **k: calls.append(self.training) or evaluate(self, *a, **k)
    )
    done = script_here(
        "scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.iterations=2"
    )
    assert "objective: DKDM + features x 0.5" in done.stdout
    assert "features" in (tmp_path / "run/progress.csv").read_text().splitlines()[0]
    assert calls == [False, True] * 2  # teacher, student
    head = load_state_dict(newest_checkpoint(tmp_path / "run").path("head"))
    assert set(head) == {"project.weight", "project.bias"}


def test_heuns_order_is_two(modules):
    """On pixels that are normal, where the ODE's solution is known."""
    from test_solvers import START, GaussianDenoiser, exact, rms

    class Denoiser(GaussianDenoiser, th.nn.Module):
        def __init__(self, process):
            th.nn.Module.__init__(self)
            self.anything = th.nn.Parameter(th.zeros(1))
            GaussianDenoiser.__init__(self, process)

        def forward(self, *args):
            return GaussianDenoiser.__call__(self, *args)

        __call__ = forward

    full = create_gaussian_diffusion(noise_schedule="linear")
    loop = look_up(SAMPLERS, "my_samplers:HEUN", "--sampler").loop
    errors = {}
    for steps in (80, 320):
        process = create_gaussian_diffusion(
            noise_schedule="linear", predict_xstart=True, timestep_respacing=str(steps)
        )
        x = loop(process, Denoiser(full), START.shape, noise=START, clip_denoised=False)
        errors[steps] = rms(x - exact(full))
    assert np.log2(errors[80] / errors[320]) / 2 == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    "override, told",
    [
        ("student.architecture=my_networks:Nothing", "my_networks has no Nothing"),
        ("student.architecture=my_nets:ConvNet", "cannot be imported: No module named 'my_nets'"),
        ("student.architecture=unet", "'unet' is none of adm"),
        ("student.architecture=tccd", "'tccd' is none of adm"),
        ("distill.objective=adm", "'adm' is none of tccd"),
        ("student.architecture=my_networks:ConvSettings", "has no Settings"),
        ("distill.objective=my_networks:ConvNet", "has no Settings that are config.settings.Distill's"),
        (
            "student.architecture=my_networks:ConvNet",
            "attention_resolutions is a key of adm, and",
        ),
    ],
)
def test_mistakes_get_one_line(modules, tmp_path, override, told):
    done = script_here("scripts/image_kd.py", "--config", distillation(tmp_path), override, check=False)
    assert told in one_line_error(done)


def test_a_bug_in_a_network_keeps_its_traceback(modules, monkeypatch):
    """It is no mistake in the configuration, unless it raises ValueError."""
    network_class = look_up({}, "my_networks:ConvNet", "architecture")

    def fails(error):
        def from_settings(*_):
            raise error

        monkeypatch.setattr(network_class, "from_settings", from_settings)
        build_network(denoiser(architecture="my_networks:ConvNet"))

    with pytest.raises(TypeError):
        fails(TypeError("object of type 'int' has no len()"))
    with pytest.raises(UserError, match="configuration: width must be even"):
        fails(ValueError("width must be even"))
