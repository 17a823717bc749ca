"""A run that is killed and started again is the run that would have been, to the last bit."""

import datetime
import json
import os
import random
import tarfile
import time
import types

import pytest
import torch as th
from driver import (
    SECONDS,
    Child,
    assert_readable,
    assert_same_end,
    die_while_saving,
    distil,
    kill_in_step,
    rows,
    run,
    run_ranks,
    train,
)
from golden_data import GOLDEN
from tiny import script

from guided_diffusion import dist_util, train_util
from guided_diffusion.io import files
from guided_diffusion.logger import read_progress
from guided_diffusion.runs import run_directory, run_record, start
from guided_diffusion.runs.checkpoint import newest_checkpoint

MAKE = {"kd": distil, "train": train}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind, ranks",
    [("kd", 2), *(pytest.param(*one, marks=SLOW) for one in (("kd", 1), ("train", 1), ("train", 2)))],
)
def test_killed_in_a_step_and_started_again(tmp_path, kind, ranks):
    """The checkpoint (4) is neither where it dies (6, 9) nor at the end of a row of the log (3)."""
    keys = {"student__log_interval": 3} if kind == "kd" else {}
    command = MAKE[kind](tmp_path, **keys)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command.append("run.iterations=10")
    run_ranks(tmp_path, ranks, *command, "--exp_dir", straight)
    for step in (6, 9):
        tamper = kill_in_step(step, rank=ranks - 1)
        run_ranks(tmp_path, ranks, *command, "--exp_dir", killed, tamper=tamper, expect=None)
        assert newest_checkpoint(killed).step == step // 4 * 4
    text = run_ranks(tmp_path, ranks, *command, "--exp_dir", killed)
    assert "resumed from step 8" in text and "not there" not in text
    assert_same_end(straight, killed, 10)
    if ranks == 1:
        assert rows(straight) == rows(killed)
    else:  # summed over the ranks in another order
        pairs = zip(
            read_progress(straight / "progress.csv"), read_progress(killed / "progress.csv"), strict=True
        )
        for a, b in pairs:
            for row in (a, b):
                del row["iterations_per_second"], row["seconds"]
            assert a == pytest.approx(b, rel=1e-5)


def test_another_number_of_ranks_is_told(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    run_ranks(tmp_path, 1, *command, "run.iterations=4")
    record = tmp_path / "run/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"threads": 100}))
    text = run_ranks(tmp_path, 2, *command, tamper=lambda: os.environ.pop("OMP_NUM_THREADS", None))
    assert json.loads(record.read_text())["threads"] <= max(1, os.cpu_count() // 2)
    assert "resumed from step 4" in text
    assert "the run had 1 rank(s), now 2: what is drawn at random differs from here on" in text
    assert newest_checkpoint(tmp_path / "run").step == 6


@pytest.mark.parametrize("kind, key", [("kd", "student.lr"), ("train", "lr")])
def test_other_settings_are_told(tmp_path, kind, key):
    command = [*MAKE[kind](tmp_path), "--exp_dir", tmp_path / "run"]
    run(tmp_path, *command, "run.iterations=4")
    _, told = run(tmp_path, *command, "run.iterations=5", f"{key}=0.5")
    assert f"goes on with other settings than before: {key} 0.001 -> 0.5, run.iterations 4 -> 5" in told
    assert "other settings" not in run(tmp_path, *command, "run.iterations=5", f"{key}=0.5")[1]


def test_a_pool_that_is_not_what_is_configured_is_told(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    run(tmp_path, *command, "run.iterations=4")
    _, told = run(tmp_path, *command, "run.iterations=5", "teacher.BATCH=2.0")
    assert "the pool stays the checkpoint's, " in told


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    run(tmp_path, *command, "run.iterations=4")
    path = tmp_path / "run/opt000004.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, text = run(tmp_path, *command, "--resume_checkpoint", tmp_path / "run/model000004.pt")
    assert code == 1 and "opt000004.pt is damaged" in text and "Traceback" not in text


def kill_until_done(folder, command, kills, seconds, dice):
    """Start a run again and again, killing it at random moments; for each kill, the step of the newest
    complete checkpoint before and after, and whether the process was made to die while saving.
    """
    run_folder, before, killed = folder / "run", 0, []
    while len(killed) < kills:
        saving = len(killed) % 2 == 1
        tamper = die_while_saving(dice, chance=0.02) if saving else None
        child = Child(folder / "output.txt", *command, tamper=tamper)
        if not saving:  # a moment between the start and the end of an undisturbed run
            child.process.join(dice.uniform(0, seconds))
            child.kill()
        code, text = child.wait(), child.text()
        assert code in (-9, 0), text
        assert "Traceback" not in text, text
        after = assert_readable(run_folder)
        assert after >= before, "a complete checkpoint was lost"
        told = [int(line.split()[2]) for line in text.splitlines() if line.startswith("saved step")]
        assert after >= max(told, default=0), "a checkpoint that was said to be saved is not there"
        assert "resumed" not in text or f"resumed from step {before} " in text
        if code == 0:
            return killed
        killed.append((before, after, saving))
        before = after
    assert run(folder, *command)[0] == 0
    return killed


def shown_by_kills(folder, total):
    dice = random.Random(5)
    command = distil(folder, student__save_interval=1, run__iterations=8)
    start = time.monotonic()
    assert run(folder, *command, "--exp_dir", folder / "straight")[0] == 0
    seconds = time.monotonic() - start
    killed, rounds = [], 0
    while len(killed) < total:
        here = folder / f"round{rounds}"
        here.mkdir()
        command_here = [*command, "--exp_dir", here / "run"]
        killed += kill_until_done(here, command_here, total - len(killed), seconds, dice)
        rounds += 1
        assert_same_end(folder / "straight", here / "run", 8)
        assert rows(folder / "straight") == rows(here / "run")
        assert not list((here / "run").glob(".*.tmp")), "halves of files were left"
    assert any(after > before for before, after, _ in killed), "no kill came after a save"
    saving, steps = sum(kill[2] for kill in killed), sorted({kill[1] for kill in killed})
    return (
        f"{len(killed)} SIGKILLs ({saving} while saving) in {rounds} runs, with checkpoints at steps "
        f"{steps}: none lost or unreadable; final weights, averages, optimizer, head and pool bit-equal"
    )


def test_kills_at_random_moments(tmp_path, record_property):
    record_property("told", shown_by_kills(tmp_path, 2))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills(tmp_path, record_property):
    record_property("told", shown_by_kills(tmp_path, 120))


def test_the_same_command_continues_what_is_unfinished(tmp_path):
    config_folder = tmp_path / "project/yaml"
    config_folder.mkdir(parents=True)
    command = distil(config_folder)
    experiments = tmp_path / "project/experiments/kd"
    run_ranks(tmp_path, 1, *command, tamper=kill_in_step(5), expect=None)
    code, text = run(tmp_path, *command)
    assert code == 0 and "resumed from step 4" in text
    assert len(list(experiments.iterdir())) == 1
    code, text = run(tmp_path, *command)  # that one is finished: another begins
    assert code == 0 and "resumed" not in text
    assert len(list(experiments.iterdir())) == 2


def slow_rank_zero():
    """Rank 0 takes longer than other ranks wait in a collective, such as for the encoding of a data set."""
    dist_util.TIMEOUT, inner = datetime.timedelta(seconds=3), start.choose_start

    def choose(*arguments):
        time.sleep(8)
        return inner(*arguments)

    start.choose_start = choose


def test_ranks_wait_for_what_rank_0_does_alone(tmp_path):
    text = run_ranks(tmp_path, 2, *distil(tmp_path), "--exp_dir", tmp_path / "run", tamper=slow_rank_zero)
    assert "finished" in text


def hang_in_step_2():
    inner = train_util.TrainLoop._learning_rate

    def hanging(loop):
        if loop.step == 2:
            time.sleep(SECONDS)
        return inner(loop)

    train_util.TrainLoop._learning_rate = hanging


def without_patience():
    files._PATIENCE = 0.2


def with_endless_patience():
    files._PATIENCE = float("inf")


def test_two_runs_do_not_write_into_one_directory(tmp_path):
    folder = tmp_path / "run"
    command = [*distil(tmp_path), "--exp_dir", folder, "student.log_interval=1"]
    first = Child(tmp_path / "first.txt", *command, tamper=hang_in_step_2)
    try:
        while "step 2" not in first.text():
            assert first.process.is_alive(), first.text()
            time.sleep(0.05)
        code, text = run(tmp_path, *command, tamper=without_patience)
        assert code == 1
        assert text.startswith(
            f"error: {folder}: another process is writing there (process {first.process.pid}"
        )
        assert text.count("\n") == 1
        text = run_ranks(tmp_path, 2, *command, tamper=without_patience, expect=None)
        assert "another process is writing there" in text
    finally:
        first.kill()
    assert run(tmp_path, *command)[0] == 0
    assert not (folder / ".lock").exists()


def test_the_same_command_leaves_a_run_alone_that_goes_on(tmp_path):
    config_folder = tmp_path / "project/yaml"
    config_folder.mkdir(parents=True)
    command = [*distil(config_folder), "student.save_interval=1", "student.log_interval=1"]
    first = Child(tmp_path / "first.txt", *command, tamper=hang_in_step_2)
    try:
        while "saved step 2" not in first.text():
            assert first.process.is_alive(), first.text()
            time.sleep(0.05)
        code, text = run(tmp_path, *command, tamper=with_endless_patience)
        assert code == 0 and "resumed" not in text
    finally:
        first.kill()
    assert len(list((tmp_path / "project/experiments/kd").iterdir())) == 2


def test_commands_that_start_together_do_not_meet(tmp_path):
    config_folder = tmp_path / "project/yaml"
    config_folder.mkdir(parents=True)
    command = [*distil(config_folder), "run.iterations=1", "student.lr=2e-3"]
    both = [Child(tmp_path / f"{i}.txt", *command, tamper=at_one_moment) for i in range(2)]
    assert [child.wait() for child in both] == [0, 0], [child.text() for child in both]
    names = [path.name for path in (tmp_path / "project/experiments/kd").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("tiny,iterations=1,lr=2e-3-2026-01-02-03-04-05-") for name in names)


def at_one_moment():
    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    run_directory.datetime = run_record.datetime = types.SimpleNamespace(datetime=Clock)


@pytest.mark.parametrize(
    "overrides, name",
    [
        ([], "c"),
        (["student.lr=1e-3", "run.seed=1"], "c,lr=1e-3,seed=1"),
        (["teacher.num_heads=2", "student.num_heads=4"], "c,teacher.num_heads=2,student.num_heads=4"),
        (["student.ema_rate=0.9,0.99", "teacher.tempfile=/a b/t.pt"], "c,ema_rate=0.9-0.99,tempfile=t.pt"),
        (["student.model_path=gs://bucket/ü*.pt"], "c,model_path=-.pt"),
    ],
)  # fmt: skip
def test_a_runs_name_tells_what_the_command_line_changes(overrides, name):
    assert run_directory.run_name("c", overrides) == name


def test_a_long_name_is_cut_and_still_tells_runs_apart():
    long = [f"student.model_path={'x' * 100}{end}" for end in "ab"]
    names = {run_directory.run_name("c", [one]) for one in long}
    assert len(names) == 2 and all(len(name) == 81 for name in names)


def test_preparing_clears_what_a_killed_one_left(tmp_path):
    config = distil(tmp_path)[2]
    (pool,) = tmp_path.glob("*.cache")
    left = tmp_path / f".{pool.name}.rank1.part.99.tmp"
    other = tmp_path / ".other.cache.99.tmp"
    for path in (left, other):
        path.write_bytes(b"half")
    assert run(tmp_path, "scripts/dynamic_prepare.py", "--config", config, "--overwrite")[0] == 0
    assert not left.exists() and other.exists() and not list(tmp_path.glob(".*.lock"))


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_preparing_clears_the_parts_of_one_killed_while_they_were_joined(tmp_path, flags):
    config = distil(tmp_path)[2]
    (pool,) = tmp_path.glob("*.cache")
    for rank in (0, 1):
        (tmp_path / f"{pool.name}.rank{rank}.part").write_bytes(b"its share")
    stopped = tmp_path / f"{pool.name}.rank0.partial"
    stopped.write_bytes(b"what a stopped --overwrite goes on from, were it whole")
    assert run(tmp_path, "scripts/dynamic_prepare.py", "--config", config, *flags)[0] == 0
    assert pool.exists() and not list(tmp_path.glob("*.part"))
    assert stopped.exists() == (flags == [])


def test_a_run_that_is_continued_keeps_its_first_start(tmp_path):
    folder = tmp_path / "run"
    command = [*distil(tmp_path), "--exp_dir", folder]
    assert run(tmp_path, *command, "run.iterations=2", tamper=at_one_moment)[0] == 0
    assert run(tmp_path, *command, "run.iterations=3")[0] == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["started"] == "2026-01-02T03:04:05" and record["ended"] == "finished"
    (again,) = record["resumed"]
    assert again > record["started"]
    assert run(tmp_path, *command, "student.lr=-1")[0] == 1  # refused before it is started again
    (folder / "run.json").write_text("[" * 100_000)
    assert run(tmp_path, *command, "run.iterations=4", tamper=at_one_moment)[0] == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["started"] == "2026-01-02T03:04:05" and record["resumed"] == []


def test_a_run_says_what_it_was(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    assert run(tmp_path, *command)[0] == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["ended"] == "finished"
    assert record["command"][0].endswith("image_kd.py") and "--exp_dir" in record["command"]
    assert {"python", "torch", "numpy", "omegaconf", "safetensors", "mpi4py"} == set(record["versions"])
    assert record["versions"]["torch"] and record["versions"]["safetensors"]
    assert "git_revision" in record and "started" in record
    assert record["resumed"] == []
    (rank,) = record["ranks"]
    assert rank.startswith("rank 0: host ") and "cpu" in rank


@pytest.mark.parametrize(
    "kind, named",
    [
        ("kd", False),
        pytest.param("train", True, marks=SLOW),
        pytest.param("kd", True, marks=SLOW),
        pytest.param("train", False, marks=SLOW),
    ],
    ids=["kd-found", "train-exp_dir", "kd-exp_dir", "train-found"],
)
def test_a_run_of_version_0_1_0_goes_on(tmp_path, kind, named):
    """Killed at step 2 of 4, it continues to the weights that version reached, mirroring nothing."""
    with tarfile.open(GOLDEN / "run_written_by_0.1.0.tar.xz") as archive:
        # Python before 3.10.12 and 3.11.4 has no filters; the archive is our own.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(tmp_path)
    (tmp_path / kind).rename(tmp_path / "run")
    flags = ["--config", f"{kind}.yaml"]
    directory = tmp_path / "run"
    if named:
        flags += ["--exp_dir", directory]
    else:
        directory = tmp_path / f"experiments/{kind}/{kind}-2026-11-25-01-32-29"
        directory.parent.mkdir(parents=True)
        (tmp_path / "run").rename(directory)
    name = "image_kd" if kind == "kd" else "image_train"
    flags += ["--data_dir", "images.npz"] if kind == "train" else []
    done = script(f"scripts/{name}.py", *flags, cwd=tmp_path)
    assert "resumed from step 2" in done.stdout
    assert ("goes on without" in done.stdout) == (kind == "train")
    expected = th.load(directory / "expected.pt", weights_only=True)
    ours = th.load(directory / "ema_0.9_000004.pt", weights_only=True)
    for key, value in expected.items():  # the same processor gives the same bits
        th.testing.assert_close(ours[key], value, atol=2e-5, rtol=1e-4)
    assert json.loads((directory / "run.json").read_text())["started"].startswith("2026-11-25T01:32")
