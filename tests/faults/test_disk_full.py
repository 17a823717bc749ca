"""A disk that is full, or fails, costs no more than the checkpoints that could not be written."""

import errno
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch as th
from driver import assert_readable, assert_same_end, distil, run
from safetensors import SafetensorError

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path, write_text
from guided_diffusion.runs import checkpoint_writer
from guided_diffusion.runs.checkpoint import Retention, complete_checkpoints, newest_checkpoint
from guided_diffusion.runs.checkpoint_writer import CheckpointWriter


def full_disk(steps, error=errno.ENOSPC):
    """A tampering: the optimizer's file of some steps' checkpoints is written half, then there is no room."""

    def tamper():
        inner = th.save

        def save(content, path):
            step = int(Path(path).name.split(".")[1].removeprefix("opt")) if ".opt" in str(path) else 0
            if step in steps:
                Path(path).write_bytes(b"half")
                raise OSError(error, os.strerror(error))
            inner(content, path)

        th.save = save

    return tamper


def test_the_run_goes_on_and_tries_again(tmp_path):
    command = distil(tmp_path, student__save_interval=2, run__iterations=8)
    folder, straight = tmp_path / "run", tmp_path / "straight"
    code, text = run(tmp_path, *command, "--exp_dir", folder, tamper=full_disk((4, 6)))
    assert code == 0, text
    assert text.count("WARNING: could not save step") == 2
    assert "could not save step 4: [Errno 28] No space left on device" in text
    assert "training goes on, older checkpoints stay" in text and "Traceback" not in text
    names = {path.name for path in folder.iterdir()}
    assert not any("000004" in name or "000006" in name or name.endswith(".tmp") for name in names)
    assert [c.step for c in complete_checkpoints(folder)] == [2, 8]
    run(tmp_path, *command, "--exp_dir", straight)
    assert_same_end(straight, folder, 8)


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "queue")  # as /dev/null, in whose place root could put a file
    (tmp_path / "folder").mkdir()
    for name in ("queue", "folder"):
        with pytest.raises(OSError, match="is there, and is no file"), atomic_path(tmp_path / name):
            raise AssertionError("not to be reached")
    assert stat.S_ISFIFO((tmp_path / "queue").stat().st_mode)


def test_of_a_link_the_target_is_written(tmp_path):
    (tmp_path / "large").mkdir()
    link, target = tmp_path / "pool.cache", tmp_path / "large/pool.cache"
    link.symlink_to(target)
    for text in ("one", "two"):
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["large", "pool.cache", "pool.cache"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for error in (OSError(errno.EFBIG, "File too large"), SafetensorError("No space left on device")):
        with (
            pytest.raises(OSError, match=re.escape(str(tmp_path / "a.bin"))),
            atomic_path(tmp_path / "a.bin"),
        ):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_pool_that_the_disk_cannot_take_is_not_begun(tmp_path):
    """A preparation takes hours, and is lost where it cannot be written in the end."""

    def tamper():
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)

    _, *rest = distil(tmp_path)
    for pool in tmp_path.glob("*.cache*"):
        pool.unlink()
    code, text = run(tmp_path, "scripts/dynamic_prepare.py", *rest, tamper=tamper)
    assert code == 1 and "Traceback" not in text
    assert re.search(r"error: teacher\.tempfile: .* takes 0\.1 MB, and 0\.0 MB are free there", text)
    assert "preparing" not in text


def test_a_run_that_could_not_save_its_end_fails(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run"]
    code, text = run(tmp_path, *command, tamper=full_disk((6,), errno.EIO))
    assert code == 1
    assert "error: the last checkpoint could not be saved: [Errno 5] Input/output error" in text
    assert "Traceback" not in text
    assert newest_checkpoint(tmp_path / "run").step == 4  # from which the same command continues
    code, text = run(tmp_path, *command)
    assert code == 0 and "resumed from step 4" in text
    assert newest_checkpoint(tmp_path / "run").step == 6


def test_a_failing_clean_up_keeps_the_new_checkpoint(tmp_path, monkeypatch):
    told = []
    writer = CheckpointWriter(tmp_path, told.append, Retention(keep_last=1))
    writer.submit(1, {"model": {"w": th.ones(1)}})
    writer.wait()

    def fail(checkpoint):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_writer, "remove_checkpoint", fail)
    writer.submit(2, {"model": {"w": th.ones(1)}})
    writer.close()
    assert [c.step for c in complete_checkpoints(tmp_path)] == [1, 2]
    assert newest_checkpoint(tmp_path).step == 2
    assert told[-1].startswith("WARNING: could not remove older checkpoints")


def test_a_writer_that_never_could_save_says_so(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 576 vs 534")  # torch's words for a full disk

    monkeypatch.setattr(th, "save", fail)
    writer = CheckpointWriter(tmp_path, lambda line: None)
    writer.submit(1, {"model": {}})
    with pytest.raises(UserError, match=r"unexpected pos 576 vs 534; .* MB are free"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_save_leaves_no_thread_behind(tmp_path):
    """One that stays keeps OpenMP threads of its own, which slow every other thread's."""

    def threads():
        return set(os.listdir("/proc/self/task"))

    writer = CheckpointWriter(tmp_path, lambda line: None)
    before = threads()
    writer.submit(1, {"model": {"w": th.ones(1 << 20)}})
    writer.wait()
    until = time.monotonic() + 20
    while threads() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() <= before
    writer.close()


@pytest.mark.parametrize("last, every, kept", [(0, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [5, 6]), (2, 3, [3, 5, 6])])
def test_what_is_kept(tmp_path, last, every, kept):
    writer = CheckpointWriter(tmp_path, lambda line: None, Retention(last, every))
    for step in range(1, 7):
        writer.submit(step, {"model": {"w": th.ones(1)}, "pool": lambda path: path.write_bytes(b"pool")})
    writer.close()
    found = complete_checkpoints(tmp_path)
    assert [c.step for c in found] == kept
    assert [c.step for c in found if c.has("pool")] == [5, 6]
    assert len(list(tmp_path.iterdir())) == 2 * len(kept) + 2


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path):
    command = distil(tmp_path, student__save_interval=1, run__iterations=8)
    assert run(tmp_path, *command, "--exp_dir", tmp_path / "straight")[0] == 0
    first = sum(p.stat().st_size for p in (tmp_path / "straight").glob("*000008*"))
    small = tmp_path / "small"
    small.mkdir()
    size = f"size={int(2.5 * first)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", small]).returncode:
        pytest.skip("cannot mount here")
    try:
        code, text = run(tmp_path, *command, "--exp_dir", small / "run")
        assert code == 1, text
        assert "error: the last checkpoint could not be saved" in text and "Traceback" not in text
        step = assert_readable(small / "run")
        assert 1 <= step <= 3
        assert not any(f"{n:06d}" in p.name for p in (small / "run").iterdir() for n in range(step + 1, 9))
        code, text = run(tmp_path, *command, "--exp_dir", small / "run")  # still full: the record, too
        assert code == 1, text
        assert assert_readable(small / "run") == step
        subprocess.run(["mount", "-o", "remount,size=1g", small], check=True)
        code, text = run(tmp_path, *command, "--exp_dir", small / "run")
        assert code == 0 and f"resumed from step {step}" in text, text
        assert_same_end(tmp_path / "straight", small / "run", 8)
    finally:
        subprocess.run(["umount", small], check=True)
