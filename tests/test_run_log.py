"""What a run records to TensorBoard, and to Weights & Biases through the real client, offline."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from in_process import script_here
from tensorboardX.proto.event_pb2 import Event
from tiny import distillation, one_line_error, script

from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.logger import RunLog, read_progress
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.figures import save_curves, save_grid

needs_wandb = pytest.mark.skipif(
    not importlib.util.find_spec("wandb"), reason="wandb is not installed (pip install wandb)"
)


def events(folder):
    """The events of a run's TensorBoard files: protocol buffers, each with its length before it."""
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16


def test_rows_and_pictures_are_events(tmp_path):
    path = tmp_path / "samples000004.png"
    save_grid(path, np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    log = RunLog(tmp_path, config={"run": {"seed": 3}})
    log.row(4, {"loss": 0.5})
    log.picture(4, "samples/ema", path)
    log.close()
    RunLog(tmp_path / "elsewhere", active=False).picture(4, "samples/ema", path)
    found = {value.tag: (event.step, value) for event in events(tmp_path) for value in event.summary.value}
    assert found.keys() == {"loss", "samples/ema", "config/text_summary"}
    assert {step for step, _ in found.values()} == {4}  # from where readers forget an interrupted run
    assert found["loss"][1].simple_value == 0.5
    text = found["config/text_summary"][1]
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val == [b"```yaml\nrun:\n  seed: 3\n```"]
    image = found["samples/ema"][1].image
    assert image.encoded_image_string == path.read_bytes()
    assert (image.width, image.height) == (32, 12)
    assert not (tmp_path / "elsewhere").exists()


def test_values_of_one_step_are_one_row(tmp_path):
    log = RunLog(tmp_path)
    log.row(2, {"loss": 0.5})
    log.row(4, {"loss": 0.25})
    log.row(4, {"eval_fd": 3.0})
    log.row(6, {"loss": 0.125})
    expected = [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25, "eval_fd": 3.0}]
    assert read_progress(tmp_path / "progress.csv") == [*expected, {"step": 6, "loss": 0.125}]
    resumed = RunLog(tmp_path)
    resumed.drop_rows_after(4)
    resumed.row(4, {"eval_fd": 3.5})  # its score had not been computed
    expected[1]["eval_fd"] = 3.5
    assert read_progress(tmp_path / "progress.csv") == expected


def test_a_resumed_run_keeps_the_events_of_its_checkpoints_step(tmp_path):
    """A reader drops, at each start of a process, what is recorded from its step on."""
    log = RunLog(tmp_path)
    log.drop_rows_after(-1)
    for step in (2, 4, 6):
        log.row(step, {"loss": step / 2})
    log.close()
    resumed = RunLog(tmp_path)
    resumed.drop_rows_after(4)
    resumed.row(4, {"eval_fd": 3.0})
    resumed.row(8, {"loss": 4.0})
    resumed.close()
    anew = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert anew == [0, 5]


class DeadClient:
    """W&B's, whose process has ended."""

    def log(self, *_, **__):
        raise ConnectionResetError("Connection lost")

    finish = log


@needs_wandb
def test_a_run_outlives_wandbs_own_process(tmp_path, capsys):
    log = RunLog(tmp_path)
    log._wandb = DeadClient()
    log.row(2, {"loss": 0.5})
    log.row(4, {"loss": 0.25})
    log.close()
    assert [row["step"] for row in read_progress(tmp_path / "progress.csv")] == [2, 4]
    assert capsys.readouterr().err == "WARNING: W&B: Connection lost; nothing more is recorded there\n"


@pytest.mark.filterwarnings("error")
def test_curves_are_of_losses_and_no_picture_of_none(tmp_path):
    log = RunLog(tmp_path)
    picture = tmp_path / "curves.png"
    log.row(2, {"lr": 0.5, "stage1_mse_q0": 0.5})
    save_curves(picture, tmp_path / "progress.csv", "a run")
    assert not picture.exists()
    log.row(4, {"lr": 0.5, "stage1_bottleneck": 0.25})
    save_curves(picture, tmp_path / "progress.csv", "a run")
    assert picture.exists()
    log.close()


def wandb_records(path):
    """The records of a .wandb file: protocol buffers in the framing of LevelDB's log, after a header."""
    from wandb.proto import wandb_internal_pb2

    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def told(folder):
    """Of each start of a run: its id, name and configuration, and the rows of its history."""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run, rows = None, []
        for record in wandb_records(path):
            if record.HasField("run") and run is None:
                run = record.run
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        yield path.parent, run, rows


@pytest.mark.slow
@needs_wandb
def test_a_run_and_its_continuation_are_one(tmp_path):
    config, folder = distillation(tmp_path), tmp_path / "run"
    script_here("scripts/dynamic_prepare.py", "--config", config)
    command = ["scripts/image_kd.py", "--config", config, "--exp_dir", folder, "--wandb", "student.lr=2e-3"]
    command += ["run.sample_interval=0", "run.sample_respacing=2", "run.num_samples=2"]
    command += ["student.log_interval=1", "run.eval_interval=2", "run.eval_samples=8"]
    np.savez(tmp_path / "digits.npz", load_digit_images()[0][:100])
    command += ["run.eval_backend=digits", f"run.eval_reference={tmp_path / 'digits.npz'}"]
    for iterations in (2, 4):
        script(*command, f"run.iterations={iterations}", WANDB_MODE="offline", WANDB_SILENT="true")
    assert newest_checkpoint(folder).step == 4
    starts = list(told(folder))
    assert len(starts) == 2
    for (where, run, rows), steps in zip(starts, ([1, 2], [3, 4]), strict=True):
        assert run.run_id == (folder / "wandb_id").read_text()
        assert run.display_name.startswith("tiny,lr=2e-3,sample_interval=0,")
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["student"]["lr"] == 2e-3 and settings["teacher"]["batch_size"] == 6
        assert [row["_step"] for row in rows if "loss" in row] == steps
        assert all(row["loss"] > 0 and row["lr"] == 2e-3 for row in rows if "loss" in row)
        (scored,) = [row for row in rows if "eval_fd" in row]
        assert scored["_step"] == steps[-1] and "eval_precision" in scored
        pictures = {f"samples{steps[-1]:06d}.png", f"samples_raw{steps[-1]:06d}.png"}
        pictures |= {"samples_teacher.png"}  # the second start's is the first one's
        files = {file.read_bytes() for file in Path(where, "files/media/images").rglob("*.png")}
        assert files == {(folder / name).read_bytes() for name in pictures}
        named = [key.partition("/")[2] for row in rows for key in row if key.startswith("samples/")]
        assert {name.partition("/")[0] for name in named} >= {"raw", "ema"}


@needs_wandb
def test_a_refusal_is_told_in_one_line(tmp_path):
    config = distillation(tmp_path)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    command = ["scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "--wandb"]
    for wrong in ({"WANDB_PROJECT": "a/b"}, {"WANDB_BASE_URL": "nowhere"}):
        refused = script(*command, check=False, **{"WANDB_MODE": "offline"} | wrong)
        assert one_line_error(refused).startswith("error: --wandb: ")
