"""SIGTERM, SIGINT, and ranks that die."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from driver import assert_same_end, distil, run, run_ranks
from tiny import ROOT

from guided_diffusion import train_util
from guided_diffusion.processes.stopping import EXIT_STOPPED
from guided_diffusion.runs.checkpoint import newest_checkpoint


def signal_in_step(step, *numbers):
    def tamper():
        inner = train_util.TrainLoop._optimizer_step

        def signalled(loop):
            if loop.step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return inner(loop)

        train_util.TrainLoop._optimizer_step = signalled

    return tamper


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_step_is_finished_and_saved(tmp_path, name):
    command = distil(tmp_path)
    folder, straight = tmp_path / "run", tmp_path / "straight"
    tamper = signal_in_step(2, getattr(signal, name))
    code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=tamper)
    assert code == EXIT_STOPPED == 75
    assert f"stopped by {name} at step 3; run the same command again to continue" in text
    assert "Traceback" not in text
    assert newest_checkpoint(folder).step == 3
    assert json.loads((folder / "run.json").read_text())["ended"] == f"stopped by {name} at step 3"
    if name == "SIGTERM":
        code, text = run(tmp_path, *command, "--exp_dir", folder)
        assert code == 0 and "resumed from step 3" in text
        assert json.loads((folder / "run.json").read_text())["ended"] == "finished"
        assert run(tmp_path, *command, "--exp_dir", straight)[0] == 0
        assert_same_end(straight, folder, 6)


@pytest.mark.parametrize("second, status", [("SIGTERM", -signal.SIGTERM), ("SIGINT", 130)])
def test_a_second_signal_stops_at_once(tmp_path, second, status):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    tamper = signal_in_step(2, signal.SIGTERM, getattr(signal, second))
    code, text = run(tmp_path, *command, tamper=tamper)
    assert code == status, text
    assert "Traceback" not in text
    assert newest_checkpoint(tmp_path / "run") is None


def test_all_ranks_leave_together(tmp_path):
    """Every rank is told by one of them, and each exits with the status."""
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]

    def tamper():
        if os.environ["RANK"] == "1":
            signal_in_step(2, signal.SIGTERM)()

    text = run_ranks(tmp_path, 2, *command, tamper=tamper, expect=EXIT_STOPPED)
    assert "stopped by a signal to another rank at step 3" in text
    assert newest_checkpoint(tmp_path / "run").step == 3


def under_mpiexec(folder, fault):
    """Status and output of a run whose rank 1 meets a fault; a job that outlives a minute fails the test."""
    command = [*distil(folder), "--exp_dir", folder / "run"]
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    tampered = [sys.executable, str(Path(__file__).parent / "tampered.py"), fault, str(ROOT / command[0])]
    done = subprocess.run(
        [mpiexec, "-n", "2", *tampered, *map(str, command[1:])],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_signal_to_one_rank_of_mpiexec(tmp_path):
    code, text = under_mpiexec(tmp_path, "SIGTERM")
    assert code == EXIT_STOPPED, text
    assert newest_checkpoint(tmp_path / "run").step == 3
    assert "Traceback" not in text


def test_an_exception_on_one_rank_ends_all(tmp_path):
    code, text = under_mpiexec(tmp_path, "exception")
    assert code not in (0, EXIT_STOPPED), text
    assert "[rank 1] ValueError: a fault on rank 1" in text
    assert "[rank 1] Traceback" in text
    ended = json.loads((tmp_path / "run/run.json").read_text())["ended"]
    assert ended == "rank 1: ValueError('a fault on rank 1')"


def test_a_killed_rank_ends_all(tmp_path):
    code, text = under_mpiexec(tmp_path, "SIGKILL")
    assert code not in (0, EXIT_STOPPED), text


@pytest.mark.slow
def test_a_mistake_that_one_rank_alone_finds_ends_all(tmp_path):
    code, text = under_mpiexec(tmp_path, "mistake")
    assert code not in (0, EXIT_STOPPED), text
    assert "error: [rank 1] a mistake on rank 1" in text
    assert "Traceback" not in text
