"""The benchmark of the commands runs and prints its tables. What it measures is no test's affair."""

import re

import pytest
from tiny import ROOT, script


def test_the_table():
    out = script("benchmarks/run.py", "--quick").stdout
    for name in ("image_kd.py", "dynamic_prepare.py", "image_sample.py", "plain PyTorch"):
        assert re.search(rf"^{name}.* \d+\.\d+ +\d+\.\d+ +\d+%$", out, re.MULTILINE), out
    for name in ("teacher step", "whole iteration", "sampling step of the student"):
        assert re.search(rf"^{name} .* ms .* ms .*%$", out, re.MULTILINE), out


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


def test_a_teacher_that_hands_over_to_itself_loses_nothing(tmp_path):
    script("datasets/digits.py", "--out", tmp_path)
    out = script(
        *("benchmarks/handover.py", "--config", ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"),
        *("--model_path", ROOT / "model/digits_teacher.pt", "--reference", tmp_path / "digits.npz"),
        *("--num_samples", 70, "--steps", 500, "--timestep_respacing", 5, "student.num_channels=32"),
    ).stdout
    rows = re.findall(
        r"^(teacher|teacher, student below 500|student) +(\d+\.\d{3}) +-?(\d+\.\d{3})$", out, re.M
    )
    assert len(rows) == 3 and len({row[1] for row in rows}) == 1 and {row[2] for row in rows} == {"0.000"}, (
        out
    )
