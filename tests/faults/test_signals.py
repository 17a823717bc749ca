"""SIGTERM, SIGINT, and ranks that die."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch as th
from driver import Child, assert_same_end, distil, run, run_ranks, train
from tiny import ROOT, T, distillation

from guided_diffusion import train_util
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.processes import stopping
from guided_diffusion.processes.stopping import EXIT_STOPPED
from guided_diffusion.runs import checkpoint, run_record, start
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.sampling import sample_set
from guided_diffusion.setups import distillation as setup
from guided_diffusion.setups import preparing
from guided_diffusion.unet import UNetModel

SLOW = pytest.mark.slow


def signal_in_step(step, *numbers):
    def tamper():
        inner = train_util.TrainLoop._learning_rate

        def signalled(loop):
            if loop.step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return inner(loop)

        train_util.TrainLoop._learning_rate = signalled

    return tamper


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=SLOW)])
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


@pytest.mark.parametrize("second, status", [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=SLOW)])
def test_a_second_signal_stops_at_once(tmp_path, second, status):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]

    def tamper():
        stopping.ECHO = 0.0
        signal_in_step(2, signal.SIGTERM, getattr(signal, second))()

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


def under_mpiexec(folder, fault, command=None):
    """Status and output of a run whose ranks meet a fault; a job that outlives a minute fails the test."""
    command = command or [*distil(folder), "--exp_dir", folder / "run"]
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


def test_a_signal_to_mpiexec_and_to_its_ranks(tmp_path):
    """As `scancel` sends it: a rank gets it from mpiexec again, and stops in good order all the same."""
    code, text = under_mpiexec(tmp_path, "SIGTERM to mpiexec too")
    assert code == EXIT_STOPPED, text
    assert newest_checkpoint(tmp_path / "run").step == 3


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


@pytest.mark.parametrize("alone", [(0,), (1,), (0, 1)])
def test_a_mistake_found_before_the_ranks_meet_ends_all(tmp_path, alone):
    """As where one host lacks a file: nobody waits, and it is told once."""
    mpiexec, command = Path(sys.executable).parent / "mpiexec", distil(tmp_path)
    ranks = []
    for rank in (0, 1):
        overrides = ["student.batch_size=none"] if rank in alone else []
        ranks += [":", "-n", 1, sys.executable, ROOT / command[0], *command[1:], *overrides]
    done = subprocess.run(
        list(map(str, [mpiexec, *ranks[1:]])),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    who = "[rank 1] " if alone == (1,) else ""
    told = f"error: {who}{tmp_path / 'tiny.yaml'}: student.batch_size: "
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path):
    code, text = under_mpiexec(tmp_path, "mistake of all")
    assert code == 1, text
    assert text.count("error: ") == 1 and "error: [rank 0] a mistake on every rank" in text


def test_an_exception_before_the_ranks_meet_ends_all(tmp_path):
    code, text = under_mpiexec(tmp_path, "early exception")
    assert code not in (0, EXIT_STOPPED), text
    assert "ValueError: a fault before the ranks meet" in text


# --- outside the training loop -----------------------------------------------------------------------


def signal_at(module, name, calls=1, number=signal.SIGTERM, rank=0):
    """A tampering: a signal comes when a function is called for the n-th time, on one rank."""

    def tamper():
        inner, left = getattr(module, name), [calls]

        def signalled(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and train_util.dist_util.rank() == rank:
                os.kill(os.getpid(), number)
            return inner(*args, **kwargs)

        setattr(module, name, signalled)

    return tamper


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=SLOW)])
@pytest.mark.parametrize(
    "where", ["load_teacher", *(pytest.param(one, marks=SLOW) for one in ("read_pool", "place"))]
)
def test_a_signal_while_a_run_starts(tmp_path, where, name):
    command, folder = distil(tmp_path), tmp_path / "run"
    tamper = signal_at(setup, where, number=getattr(signal, name))
    code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=tamper)
    assert code == EXIT_STOPPED, text
    assert f"stopped by {name}; run the same command again to continue" in text and "Traceback" not in text
    assert json.loads((folder / "run.json").read_text())["ended"] == f"stopped by {name}"
    assert not (folder / ".lock").exists()
    if name == "SIGTERM":
        assert run(tmp_path, *command, "--exp_dir", folder, "run.iterations=1")[0] == 0


@pytest.mark.parametrize("training", [pytest.param(False, marks=SLOW), True])
def test_a_signal_during_an_import(tmp_path, training):
    """An exception in the middle of torch's import would crash the process."""
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nDONE = 1\n"
    (tmp_path / "signalled.py").write_text(code)
    owner, name = (train_util.TrainLoop, "_learning_rate") if training else (setup, "load_teacher")

    def tamper():
        sys.path.insert(0, str(tmp_path))
        stopping.GRACE = 0.5
        inner = getattr(owner, name)

        def importing(*args):
            import signalled

            assert signalled.DONE
            return inner(*args)

        setattr(owner, name, importing)
        # Of a run that has saved, the end is waited for, however long it takes.
        start.save_curves = lambda *_: time.sleep(2)

    code, text = run(tmp_path, *distil(tmp_path), "--exp_dir", tmp_path / "run", tamper=tamper)
    assert code == EXIT_STOPPED and "Traceback" not in text, text
    newest = newest_checkpoint(tmp_path / "run")
    assert newest.step == 1 if training else newest is None
    assert ("stopped by SIGTERM at step 1; run the same command" in text) == training, text


@pytest.mark.parametrize("last", [pytest.param(True, marks=SLOW), False])
def test_a_signal_during_a_save(tmp_path, last):
    """During the last one: the run has finished, and says so."""
    command, folder = distil(tmp_path), tmp_path / "run"
    if not last:
        command.append("run.iterations=200")  # the save goes on beside the training
    tamper = signal_at(checkpoint, "_write_manifest", calls=2 if last else 1)
    code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=tamper)
    assert code == (0 if last else EXIT_STOPPED), text
    ended = json.loads((folder / "run.json").read_text())["ended"]
    assert (ended == "finished") == last
    assert newest_checkpoint(folder).step == (6 if last else int(ended.rpartition(" ")[2]))


def test_a_signal_in_the_last_iteration_or_after_it(tmp_path):
    command = distil(tmp_path)
    for i, tamper in enumerate([signal_in_step(5, signal.SIGTERM), signal_at(run_record, "_write", calls=2)]):
        folder = tmp_path / str(i)
        code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=tamper)
        assert code == 0, text
        assert json.loads((folder / "run.json").read_text())["ended"] == "finished"
        assert newest_checkpoint(folder).step == 6


def assert_same_pool(a, b):
    first, second = read_pool(a, T, (3, 16, 16)), read_pool(b, T, (3, 16, 16))
    assert th.equal(first.x, second.x) and th.equal(first.levels, second.levels)
    assert (first.y is None) == (second.y is None) and (first.y is None or th.equal(first.y, second.y))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2])
def test_a_stopped_preparation_goes_on_as_if_it_had_not(tmp_path, ranks):
    """Stopped twice, by a signal to the last rank alone."""
    config = distillation(tmp_path, class_cond=True, num_classes=3, distill__stride=3)
    command = ["scripts/dynamic_prepare.py", "--config", config]
    straight, stopped = tmp_path / "straight.cache", tmp_path / "stopped.cache"
    run_ranks(tmp_path, ranks, *command, f"teacher.tempfile={straight}")
    command.append(f"teacher.tempfile={stopped}")
    for _ in range(2):
        tamper = signal_at(UNetModel, "forward", calls=3, rank=ranks - 1)
        text = run_ranks(tmp_path, ranks, *command, tamper=tamper, expect=EXIT_STOPPED)
        assert "run the same command again to continue" in text and "Traceback" not in text
        assert not stopped.exists()
        assert len(list(tmp_path.glob("stopped.cache.rank*.partial"))) == ranks
    text = run_ranks(tmp_path, ranks, *command, "--overwrite")
    assert f"continuing what {stopped}.rank0.partial holds" in text
    assert_same_pool(straight, stopped)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.part"))


def test_a_stopped_preparation_of_something_else(tmp_path):
    config = distillation(tmp_path)
    command = ["scripts/dynamic_prepare.py", "--config", config]
    partial = tmp_path / "pool.cache.rank0.partial"

    def stop():
        tamper = signal_at(UNetModel, "forward", calls=3)
        assert run(tmp_path, *command, "--overwrite", tamper=tamper)[0] == EXIT_STOPPED

    stop()
    code, text = run(tmp_path, *command, "distill.stride=5")
    told = f"error: {partial}: was left by another preparation (stride 1, now 5): "
    assert code == 1 and text.startswith(told) and text.count("\n") == 1
    assert run(tmp_path, *command, "distill.stride=5", "--overwrite")[0] == 0
    assert not partial.exists()
    stop()
    damaged = bytearray(partial.read_bytes())
    damaged[-1] ^= 1
    partial.write_bytes(damaged)
    code, text = run(tmp_path, *command, "--overwrite")
    told = f"WARNING: {partial}: not a readable preparation (its contents do not have their checksum)"
    assert code == 0 and told in text
    pool = tmp_path / "again.cache"
    assert run(tmp_path, *command, f"teacher.tempfile={pool}")[0] == 0
    assert_same_pool(pool, tmp_path / "pool.cache")


def test_a_signal_while_the_pool_is_written(tmp_path):
    config = distillation(tmp_path)
    tamper = signal_at(preparing, "write_pool")
    code, text = run(tmp_path, "scripts/dynamic_prepare.py", "--config", config, tamper=tamper)
    assert code == 0 and "wrote" in text, text


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2])
def test_stopped_sampling_goes_on(tmp_path, ranks):
    config = distillation(tmp_path)
    command = ["scripts/image_sample.py", "--config", config, "--model_path", tmp_path / "teacher.pt"]
    command += ["--timestep_respacing", 2, "--batch_size", 1, "--num_samples", 5]
    whole, folder = tmp_path / "whole", tmp_path / "samples"
    run_ranks(tmp_path, ranks, *command, "--log_dir", whole)
    tamper = signal_at(sample_set, "sample_images", calls=2, rank=ranks - 1)
    text = run_ranks(tmp_path, ranks, *command, "--log_dir", folder, tamper=tamper, expect=EXIT_STOPPED)
    assert "run the same command again to continue" in text
    assert len(list((folder / "shards").glob("*.npz"))) == 2 * ranks
    run_ranks(tmp_path, ranks, *command, "--log_dir", folder)
    name = "samples_5x16x16x3.npz"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("fault", [pytest.param("held up, both told", marks=SLOW), "held up, one told"])
def test_a_rank_that_waits_for_another_is_not_left_waiting(tmp_path, fault):
    """Rank 0 waits inside gloo, where no handler runs, for rank 1, which stops."""
    code, text = under_mpiexec(tmp_path, fault)
    assert code == EXIT_STOPPED, text
    assert "Traceback" not in text


def test_a_rank_that_is_told_before_the_ranks_have_met(tmp_path):
    """mpiexec does not end the others for the sake of one that has not called MPI."""
    code, text = under_mpiexec(tmp_path, "told early")
    assert code == EXIT_STOPPED, text


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=SLOW)])
def test_workers_that_load_images_leave_signals_to_the_run(tmp_path, name):
    """A signal to the whole process group, as Ctrl-C and scancel send it."""
    command = [*train(tmp_path), "--num_workers", 1, "run.iterations=0", "--exp_dir", tmp_path / "run"]
    child = Child(tmp_path / "output.txt", *command, tamper=lambda: os.setpgid(0, 0))
    while "step 3" not in child.text():
        assert child.process.is_alive(), child.text()
        time.sleep(0.05)
    os.killpg(child.process.pid, getattr(signal, name))
    assert child.wait() == EXIT_STOPPED, child.text()
    assert "Traceback" not in child.text()


@pytest.mark.parametrize("iterations", [2, 0])
def test_workers_that_load_images_end_with_the_run(tmp_path, iterations):
    """As a user starts it: what a process does at its exit, no forked child does."""
    flags = [*map(str, train(tmp_path)), "--num_workers", "1", f"run.iterations={iterations}"]
    script = [sys.executable, ROOT / flags.pop(0), *flags, "--exp_dir", tmp_path / "run"]
    process = subprocess.Popen(script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not iterations:
            log = tmp_path / "run/log.txt"
            while not (log.is_file() and "step 3" in log.read_text()):
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
        assert process.wait(timeout=60) == (0 if iterations else EXIT_STOPPED)
    finally:
        process.kill()


def stopped_at_random(folder, seconds):
    """Start the commands under mpiexec again and again, stopping each at a random moment."""
    dice, config = random.Random(7), distillation(folder)
    commands = [
        ["dynamic_prepare.py"],
        ["image_kd.py", "--exp_dir", folder / "run"],
        ["image_sample.py", "--model_path", folder / "teacher.pt", "--timestep_respacing", "4"],
    ]
    commands[2] += ["--num_samples", "12", "--batch_size", "1", "--log_dir", folder / "samples"]
    ends, deadline = [], time.monotonic() + seconds
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    while time.monotonic() < deadline:
        for kind, (name, *flags) in enumerate(commands):
            if kind == 0 or ends[-1][1] == 0:
                command = [mpiexec, "-n", "2", sys.executable, str(ROOT / "scripts" / name)]
                command += ["--config", str(config), *map(str, flags)]
                done = subprocess.Popen(
                    command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                time.sleep(dice.uniform(1, 6))
                done.send_signal(dice.choice([signal.SIGTERM, signal.SIGINT]))
                text = done.communicate(timeout=60)[0]
                assert done.returncode in (0, EXIT_STOPPED) and "Traceback" not in text, text
                ends.append((kind, done.returncode))
        if ends[-1] == (2, 0):
            for path in [folder / "run", folder / "samples"]:
                shutil.rmtree(path)
            (folder / "pool.cache").unlink()
    statuses = [status for _, status in ends]
    return f"{len(ends)} jobs of two ranks: {statuses.count(75)} stopped, the others finished, none hung"


@pytest.mark.slow
def test_signals_at_random_moments(tmp_path, record_property):
    record_property("told", stopped_at_random(tmp_path, 180))
