"""Scores while training, of runs that are killed or stopped: computed once each; training stays exact."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from driver import assert_same_end, distil, kill_in_step, rows, run, run_ranks

from evaluations import judge  # noqa: F401 - imported here, so that no child has to
from guided_diffusion import train_util
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.training import scoring


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A command, and the end of an undisturbed run of it; it is scored at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("scores")
    np.savez(folder / "digits.npz", load_digit_images()[0][:100])
    keys = {"interval": 4, "samples": 8, "backend": "digits", "reference": str(folder / "digits.npz")}
    keys = {f"run__eval_{name}": value for name, value in keys.items()}
    command = distil(folder, run__iterations=10, run__sample_respacing=2, student__save_interval=3, **keys)
    code, text = run(folder, *command, "--exp_dir", folder / "straight")
    assert code == 0, text
    return command, folder / "straight"


def instead(method, of_step, action):
    """A tampering: `action` comes before a method of the scorer's, or of its judge's, at a step."""

    def tamper():
        inner, log = getattr(scoring.Scorer, method), []
        enter = train_util.TrainLoop._score

        def entered(loop, signals):
            log.append(loop.step)
            return enter(loop, signals)

        def wrapped(self, *args):
            if log and log[-1] == of_step:
                action()
            return inner(self, *args)

        train_util.TrainLoop._score = entered
        setattr(scoring.Scorer, method, wrapped)

    return tamper


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def best(folder):
    return json.loads((folder / "best.json").read_text())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_before_a_score(project, tmp_path, ranks):
    """The checkpoint is there and its score is not, so the same command scores it first."""
    command, straight = project
    if ranks > 1:
        straight = tmp_path / "straight"
        run_ranks(tmp_path, ranks, *command, "--exp_dir", straight)
    folder = tmp_path / "run"
    tamper = instead("_draw", 4, lambda: (saved(folder, 4), die()))
    run_ranks(tmp_path, ranks, *command, "--exp_dir", folder, tamper=tamper, expect=None)
    assert newest_checkpoint(folder).step == 4 and not newest_checkpoint(folder).has("score")
    assert not (folder / "best.json").exists()
    text = run_ranks(tmp_path, ranks, *command, "--exp_dir", folder)
    assert "resumed from step 4" in text and text.count("step 4: digits-FD") == 1
    assert_same_end(straight, folder, 10)
    if ranks == 1:
        assert rows(straight) == rows(folder)
        assert best(straight) == best(folder)
    assert best(folder)["step"] == best(straight)["step"]


def assert_undisturbed(straight, folder):
    """What is left, rows and best.json are those of the run that nothing happened to."""
    assert_same_end(straight, folder, 10)
    assert rows(straight) == rows(folder)
    assert best(straight) == best(folder)


def saved(folder, step):
    """Wait for a checkpoint to be written."""
    while not (folder / f"checkpoint{step:06d}.json").exists():
        pass


def test_killed_after_a_score(project, tmp_path):
    """Its score is not computed again, and rows and best.json are those of the undisturbed run."""
    command, straight = project
    folder = tmp_path / "run"
    code, _ = run(tmp_path, *command, "--exp_dir", folder, tamper=kill_in_step(5))
    assert code == -signal.SIGKILL
    assert newest_checkpoint(folder).has("score")
    (folder / "best.json").unlink()  # as if killed before it was written
    code, text = run(tmp_path, *command, "--exp_dir", folder)
    assert code == 0 and "resumed from step 4" in text and "step 4: digits-FD" not in text
    assert_undisturbed(straight, folder)


@pytest.mark.parametrize("step", [8, 10])
def test_stopped_while_drawing_samples(project, tmp_path, step):
    """In the midst of a run and after its last iteration, which then has not ended either."""
    command, straight = project
    folder = tmp_path / "run"
    tamper = instead("_draw", step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=tamper)
    assert (
        code == 75 and f"stopped by SIGTERM at step {step}" in text and f"step {step}: digits-FD" not in text
    )
    assert newest_checkpoint(folder).step == step
    code, text = run(tmp_path, *command, "--exp_dir", folder)
    assert code == 0 and text.count(f"step {step}: digits-FD") == 1
    assert_undisturbed(straight, folder)


def test_a_run_that_ended_before_its_best_was_named(project, tmp_path):
    command, straight = project
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    (folder / "best.json").unlink()
    code, text = run(tmp_path, *command, "--exp_dir", folder)
    assert code == 0 and "step 10: digits-FD" not in text
    assert best(straight) == best(folder)
