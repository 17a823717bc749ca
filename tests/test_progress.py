"""How far work has come: bars on a real terminal, lines above them, and a line now and then elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import numpy as np
import pytest
from in_process import script_here
from tiny import ROOT, distillation

from guided_diffusion.io import progress
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.image_sets import ImageSet, write_npz


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setenv("TCCD_PROGRESS_SECONDS", "0")


def test_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    assert list(progress.tracked(range(3), "work", "parts")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TCCD_PROGRESS_SECONDS", "0")
    assert list(progress.tracked(range(3), "work", "parts")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"work: {done} of 3 parts" for done in (1, 2, 3)]
    assert re.search(r"\(\d[\d.e+]*/s, 0 s left\)$", lines[-1])


def test_what_was_done_before_does_not_count_as_speed(monkeypatch, capsys, always):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(100, "work", "parts", initial=40) as bar:
        clock[0] = 10.0
        bar.advance(20)
    assert capsys.readouterr().err == "work: 60 of 100 parts (2/s, 20 s left)\n"
    with progress.Progress(None, "work", "parts") as bar:
        bar.show({"loss": "0.5"})
        clock[0] = 12.0
        bar.advance(4)
    assert capsys.readouterr().err == "work: 4 parts (2/s, loss 0.5)\n"


def test_a_line_waits_after_more_was_told(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(100, "work", "parts") as bar:
        for clock[0] in (29.0, 31.0, 50.0):
            bar.advance()
        assert capsys.readouterr().err.startswith("work: 2 of 100")
        bar.show({"loss": "0.5"})
        for clock[0] in (62.0, 79.0, 80.0):
            bar.advance()
        assert capsys.readouterr().err.count("\n") == 1


def test_other_ranks_tell_nothing(capsys, always):
    with progress.Progress(3, "work", "parts", active=False) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_every_long_command_has_it(tmp_path, always):
    """Preparing, distilling, sampling, scoring; writing an npz is what the builders and mix.py do."""
    config = distillation(tmp_path)
    prepared = script_here("scripts/dynamic_prepare.py", "--config", config)
    assert "preparing: 32 of 32 samples" in prepared.stderr
    distilled = script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run")
    assert re.search(r"^training: 4 of 6 it \(.* left, images/s .*, loss [\d.]+\)$", distilled.stderr, re.M)
    flags = [
        "--batch_size",
        5,
        "--num_samples",
        8,
        "--timestep_respacing",
        2,
        "--log_dir",
        tmp_path / "samples",
    ]
    drawn = script_here("scripts/image_sample.py", "--model_path", tmp_path / "run/model000006.pt", *flags)
    assert "sampling: 5 of 8 images" in drawn.stderr and "sampling: 8 of 8 images" in drawn.stderr
    samples = tmp_path / "samples/samples_8x16x16x3.npz"
    scored = script_here("evaluations/evaluator.py", samples, samples, "--backend", "digits")
    assert "samples_8x16x16x3.npz: 8 of 8 images" in scored.stderr


def test_writing_images_has_it(tmp_path, capsys, always):
    blocks = iter([(np.zeros((3, 4, 4, 3), np.uint8), None)] * 2)
    write_npz(ImageSet(6, blocks), tmp_path / "out.npz")
    assert "out.npz: 6 of 6 images" in capsys.readouterr().err


def on_a_terminal(*command):
    """What a command writes to a terminal of 150 columns, and its status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    read = []

    def listen():
        while True:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # Linux' way of saying that the other side has closed
                return
            if not chunk:
                return
            read.append(chunk)

    listener = threading.Thread(target=listen)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    listener.start()
    code = process.wait(timeout=120)
    listener.join()
    os.close(ours)
    return b"".join(read).decode(), code


def test_a_training_on_a_terminal(tmp_path):
    config = distillation(tmp_path)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    np.savez(tmp_path / "digits.npz", load_digit_images()[0][:100])
    text, code = on_a_terminal(
        ROOT / "scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run",
        "run.eval_interval=3", "run.eval_samples=8", "run.eval_backend=digits", "run.sample_respacing=2",
        f"run.eval_reference={tmp_path / 'digits.npz'}",
    )  # fmt: skip
    assert code == 0, text
    lines = re.split(r"[\r\n]+", text.replace("\x1b[A", ""))
    last = [line for line in lines if line.startswith("training:")][-1]
    assert "6/6 [" in last and re.search(r"\d+:\d\d<\d+:\d\d", last) and "it/s" in last, last
    assert "images/s=" in last and "loss=" in last and "digits-FD=" in last, last
    for step in (2, 4, 6):  # each has a line of its own
        assert any(re.fullmatch(rf"step {step}/6: .* \([\d.]+ it/s\)", line) for line in lines), text
    assert any(line.startswith("drawing samples to score:") for line in lines)
