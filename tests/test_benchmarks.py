"""The benchmark of the commands runs and prints its tables. What it measures is no test's affair."""

import re
import runpy

import pytest
import torch as th
from tiny import ROOT, denoiser, network, script

from guided_diffusion.script_util import build_network


@pytest.mark.slow
def test_the_table():
    out = script("benchmarks/run.py", "--quick").stdout
    for name in ("image_kd.py", "dynamic_prepare.py", "image_sample.py", "plain PyTorch"):
        assert re.search(rf"^{name}.* \d+\.\d+ +\d+\.\d+ +\d+%$", out, re.MULTILINE), out
    for name in ("teacher step", "whole iteration", "sampling step of the student"):
        assert re.search(rf"^{name} .* ms .* ms .*%$", out, re.MULTILINE), out


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a checkout without git's history")
def test_a_comparison_with_a_revision():
    out = script("benchmarks/run.py", "--compare", "HEAD", "--quick").stdout
    assert re.search(r"^median +\d+\.\d+ +\d+\.\d+;", out, re.MULTILINE), out
    for clock in ("wall", "processor"):
        number = r"\d+\.\d{3}"
        assert re.search(rf"^ratio by the {clock}'s clock: {number} \({number} to {number}\)$", out, re.M), (
            out
        )


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a checkout without git's history")
def test_a_revision_that_is_not_there():
    done = script("benchmarks/run.py", "--compare", "no-such-revision", "--quick", check=False)
    assert done.returncode == 1
    assert "--compare no-such-revision: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_latent_digits(tmp_path):
    sizes = [
        "--vae_iterations",
        10,
        "--teacher_iterations",
        4,
        "--student_iterations",
        4,
        "--num_samples",
        100,
    ]
    out = script("benchmarks/latent_digits.py", "--out", tmp_path, *sizes).stdout
    for name in ("reconstruction", "teacher", "student"):
        assert re.search(rf"^{name} +\d+\.\d+ +\d\.\d+M +\d+ s$", out, re.MULTILINE), out


@pytest.mark.slow
def test_a_teacher_that_hands_over_to_itself_loses_nothing(tmp_path):
    script("datasets/digits.py", "--out", tmp_path)
    out = script(
        *("benchmarks/handover.py", "--config", ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"),
        *("--model_path", ROOT / "model/digits_teacher.pt", "--reference", tmp_path / "digits.npz"),
        *("--num_samples", 70, "--steps", 500, 1000, "--timestep_respacing", 5, "student.num_channels=32"),
        "--exact",
    ).stdout
    rows = re.findall(r"^([a-z]+)(?:, [a-z]+ below (\d+))? +(\d+\.\d{3}) +-?(\d+\.\d{3})$", out, re.M)
    same = [row for row in rows if row[:2] != ("exact", "500")]
    assert len(rows) == 8 and len(same) == 6, out
    assert len({row[2] for row in same}) == 1 and {row[3] for row in same} == {"0.000"}, out
    errors = re.findall(r"^t in \d+\.\.\d+ +(\d\.\d{5}) +(\d\.\d{5})$", out, re.M)
    assert len(errors) == 10 and all(theirs == ours for theirs, ours in errors), out
    noisy, clean = float(errors[-1][0]), float(errors[0][0])
    assert 0 < noisy < 0.01 < clean, out  # there the exact one knows the images by heart


@th.no_grad()
def test_the_exact_denoiser_is_the_mean_over_the_images():
    handover = runpy.run_path(str(ROOT / "benchmarks/handover.py"))
    inner, process = build_network(denoiser(**network(8)))
    images = th.rand(5, *inner.shape).double() * 2 - 1
    exact = handover["ExactDenoiser"](images.float(), handover["AsEps"](inner, process))
    t = th.tensor([3, 8, 18])
    x = process.q_sample(images[:3].float(), t, th.randn(3, *inner.shape))
    for row, step in enumerate(t):
        abar = float(process.alphas_cumprod[step])
        away = ((x[row].double() - abar**0.5 * images) ** 2).sum((1, 2, 3))
        weights = (-away / (2 * (1 - abar))).softmax(0)
        mean = (weights[:, None, None, None] * images).sum(0)
        eps = (x[row] - abar**0.5 * mean) / (1 - abar) ** 0.5
        assert th.allclose(exact.eps(x, t)[row], eps.float(), atol=1e-4)
