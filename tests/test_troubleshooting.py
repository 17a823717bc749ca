"""docs/troubleshooting.md: each message it shows is given by the program, to the mistake it belongs to."""

import re
import sys
from types import SimpleNamespace

import pytest
from in_process import script_here
from test_originals import original_pool
from tiny import ROOT, distillation, one_line_error

from guided_diffusion.errors import UserError
from guided_diffusion.processes.launch import Launch
from guided_diffusion.processes.rendezvous import rendezvous

PAGE = (ROOT / "docs/troubleshooting.md").read_text()


def shown(start):
    """The page's error line that begins so, as a pattern; its … stand for anything."""
    lines = [line for line in re.findall(r"^    (error: .*)$", PAGE, re.M) if line.startswith(start)]
    assert len(lines) == 1, start
    return re.escape(lines[0]).replace("…", ".+")


@pytest.fixture
def config(tmp_path):
    return distillation(tmp_path, image_size=8, run__iterations=4)


def mistake(script, *arguments):
    return one_line_error(script_here(script, *arguments, check=False))


@pytest.mark.parametrize(
    "mpi4py, start",
    [
        (None, "error: started by mpi"),
        (SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))), "error: mpi4py sees"),
    ],
)
def test_mpi(monkeypatch, mpi4py, start):
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    with pytest.raises(UserError) as told:
        rendezvous(Launch("mpi (MPICH)", 0, 2, 0))
    assert re.fullmatch(shown(start), f"error: {told.value}")


def test_pools_teachers_and_gradients(config, tmp_path):
    """In the order in which somebody meets them."""
    prepare, distil = (
        ["scripts/" + name, "--config", config] for name in ("dynamic_prepare.py", "image_kd.py")
    )
    assert re.fullmatch(shown("error: no such pool"), mistake(*distil))
    told = mistake(*prepare, "teacher.num_channels=64", "teacher.channel_mult=1,1,2")
    assert re.fullmatch(shown("error: …: does not fit"), told)
    told = mistake(*prepare, "teacher.model_path=model/32x32_diffusion_cifar10.pt")
    assert re.fullmatch(shown("error: teacher.model_path"), told)
    script_here(*prepare)
    linear = ["teacher.noise_schedule=linear", "student.noise_schedule=linear"]
    assert re.fullmatch(shown("error: …: was made for"), mistake(*distil, *linear))
    original_pool(tmp_path / "small.cache", 4, image_size=8)
    told = mistake(*distil, f"teacher.tempfile={tmp_path / 'small.cache'}")
    assert re.fullmatch(shown("error: …: holds"), told)
    told = mistake(*distil, "student.lr=1e30", "run.max_bad_steps=2", "--exp_dir", tmp_path / "run")
    assert re.fullmatch(shown("error: gradients"), told)


@pytest.mark.parametrize(
    "message", [*re.findall(r"^\| `([^`]+)` \|", PAGE, re.M), "no end is set (run.iterations=N"]
)
def test_other_messages_are_in_the_program(message):
    """Those of the tables, which other tests provoke: their words, between what differs."""
    if message.startswith(("student.", "distill.", "teacher.")):
        return
    source = "".join(path.read_text() for path in (ROOT / "guided_diffusion").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    for words in re.split(r"…|\d+", message):
        assert words.strip() in source, words
