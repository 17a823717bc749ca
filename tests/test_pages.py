"""docs/quick-start.md, docs/bring-your-own.md and docs/teachers.md: what they tell to do, in a small form."""

import re
import shlex

import pytest
from in_process import script_here
from test_foreign import DDPMScheduler, UNet2DModel, save
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


def run(command, replaced, *more):
    """Run a command of a page, parts of its words replaced, and with more words; returns what it prints."""
    words = shlex.split(command)
    for old, new in replaced.items():
        words = [word.replace(old, str(new)) for word in words]
    return script_here(*words, *more).stdout


def test_quick_start(elsewhere):
    prepare, distil, sample, digits, evaluate, export = commands_of("quick-start.md")
    places = {"yaml/": f"{ROOT}/yaml/", "experiments/": f"{elsewhere}/", "datasets/digits/": f"{elsewhere}/"}
    step = f"{load_distillation(ROOT / 'yaml/digits_16/exp/digits-TCCD.yaml').run.iterations:06d}"
    short = places | {step: "000002", "1000": "40"}
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
    run(digits, {}, "--out", elsewhere)
    assert "digits-FD" in run(evaluate, short)
    run(export, short)
    assert (elsewhere / "export/first/model_index.json").is_file()


def test_bring_your_own(elsewhere):
    inspect, look, prepare, distil, *_ = commands_of("bring-your-own.md")
    teacher = {"model/digits_teacher.pt": ROOT / "model/digits_teacher.pt"}
    (elsewhere / "teacher.yaml").write_text(run(inspect.split(" > ")[0], teacher))
    run(look, teacher | {"experiments": elsewhere, "50": "3"}, "--num_samples", "2")
    page = (ROOT / "docs/bring-your-own.md").read_text()
    mine = next(block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "mine.yaml" in block)
    for old, new in (teacher | {"yaml/arch": ROOT / "yaml/arch", "experiments": elsewhere}).items():
        mine = mine.replace(old, str(new))
    (elsewhere / "mine.yaml").write_text(mine)
    small = ["student.batch_size=2", "teacher.BATCH=0.002", "distill.stride=400", "run.sample_interval=-1"]
    run(prepare, {}, *small)
    run(distil, {"experiments": elsewhere}, *small, "run.iterations=1")
    assert (elsewhere / "kd/mine/ema_0.9999_000001.pt").is_file()
    # Laid over the preset, as the page says.
    lines = [line for line in mine.splitlines() if line.split(":")[0].strip() not in ("lr", "ema_rate")]
    text = "\n".join(lines).replace("run:\n  iterations: 200000", "")
    (elsewhere / "mine.yaml").write_text(f"base: {ROOT}/yaml/preset/short-run.yaml\n{text}")
    told = run(distil, {"experiments/kd/mine": elsewhere / "short"}, *small, "run.iterations=1")
    assert "initial weights are selected from the teacher's" in told and "bottleneck x 0.1" in told


def test_the_first_teacher_from_diffusers(elsewhere):
    """docs/teachers.md's first configuration, and that of the student it recommends."""
    keys = {"sample_size": 32, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2}
    keys |= {"norm_num_groups": 4, "attention_head_dim": None, "freq_shift": 1, "downsample_padding": 0}
    keys |= {"flip_sin_to_cos": False, "norm_eps": 1e-6}
    keys |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    keys |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
    folder = save(elsewhere / "teacher", UNet2DModel(**keys), DDPMScheduler(variance_type="fixed_large"))
    first, student, *_ = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.S)
    config = elsewhere / "C.yaml"
    first = first.replace("google/ddpm-cifar10-32", str(folder)).replace("yaml/arch", f"{ROOT}/yaml/arch")
    config.write_text(first)
    assert load_distillation(config).student.process.noise_schedule == "linear"
    found = run("scripts/inspect_checkpoint.py", {}, folder)
    (elsewhere / "found.yaml").write_text(found)
    teacher = first.partition("student:")[0]
    narrower = student.replace("64,128,128,128", "4,8,8,8")
    config.write_text(f"base: {ROOT}/yaml/preset/short-run.yaml\n{teacher}{narrower}  batch_size: 2\n")
    small = ["teacher.batch_size=4", "teacher.BATCH=0.002", "distill.stride=400", "run.sample_interval=-1"]
    small += [f"teacher.tempfile={elsewhere}/pool.cache", "run.iterations=1"]
    run("scripts/dynamic_prepare.py --config C.yaml", {}, *small)
    told = run("scripts/image_kd.py --config C.yaml --exp_dir run", {}, *small)
    assert "initial weights are selected from the teacher's" in told and "bottleneck x 0.1" in told
