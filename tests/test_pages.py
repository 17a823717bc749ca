"""docs/quick-start.md and docs/bring-your-own.md: their commands, one after the other, in a small form."""

import re
import shlex

import pytest
from in_process import script_here
from tiny import ROOT

from guided_diffusion.config.loading import load_distillation


def commands_of(page):
    """The lines `python SCRIPT ...` of a page's bash blocks."""
    text = (ROOT / "docs" / page).read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    return re.findall(r"^python (.*)$", blocks, re.M)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, replaced, *overrides):
    """Run a command of a page, some of its words replaced; returns what it prints."""
    for old, new in replaced.items():
        command = command.replace(old, str(new))
    return script_here(*shlex.split(command), *overrides).stdout


def test_quick_start(elsewhere):
    prepare, distil, sample, digits, evaluate, export = commands_of("quick-start.md")
    places = {"yaml/": f"{ROOT}/yaml/", "experiments/": f"{elsewhere}/", "datasets/digits/": f"{elsewhere}/"}
    step = f"{load_distillation(ROOT / 'yaml/digits_16/exp/digits-TCCD.yaml').run.iterations:06d}"
    short = places | {step: "000002", "1000": "40", "datasets/digits ": f"{elsewhere} "}
    keys = [f"teacher.tempfile={elsewhere}/pool.cache", "teacher.BATCH=0.003"]
    keys += ["run.iterations=2", "student.lr_anneal_steps=2", "run.num_samples=2", "run.sample_respacing=2"]
    run(prepare, places, *keys)
    run(distil, places, *keys)
    left = {path.name for path in (elsewhere / "kd/first").iterdir()}
    table = (ROOT / "docs/quick-start.md").read_text().split("## What a run leaves")[1].split("\n## ")[0]
    left.add("curves.png")  # see `script_here`
    for name in re.findall(r"`([\w.]+\.(?:pt|png|txt|csv|yaml|json|cache))`", table):
        assert name.replace(step, "000002") in left, name
    run(sample.replace("--timestep_respacing 50", "--timestep_respacing 3"), short)
    run(
        digits.replace(
            "datasets/digits.py --out datasets/digits", f"{ROOT}/datasets/digits.py --out {elsewhere}"
        ),
        {},
    )
    assert "digits-FD" in run(evaluate.replace("datasets/digits/", f"{elsewhere}/"), short)
    run(export, short)
    assert (elsewhere / "export/first/model_index.json").is_file()


def test_bring_your_own(elsewhere):
    inspect, look, prepare, distil, *_ = commands_of("bring-your-own.md")
    teacher = {"model/digits_teacher.pt": ROOT / "model/digits_teacher.pt"}
    (elsewhere / "teacher.yaml").write_text(run(inspect.split(" > ")[0], teacher))
    run(look, teacher | {"--num_samples 16": "--num_samples 2", "experiments": elsewhere, "50": "3"})
    page = (ROOT / "docs/bring-your-own.md").read_text()
    mine = next(block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "mine.yaml" in block)
    for old, new in (teacher | {"yaml/arch": ROOT / "yaml/arch", "experiments": elsewhere}).items():
        mine = mine.replace(old, str(new))
    (elsewhere / "mine.yaml").write_text(mine)
    small = ["student.batch_size=2", "teacher.BATCH=0.002", "distill.stride=400", "run.sample_interval=-1"]
    run(prepare, {}, *small)
    run(distil, {"experiments": elsewhere}, *small, "run.iterations=1")
    assert (elsewhere / "kd/mine/ema_0.9999_000001.pt").is_file()
