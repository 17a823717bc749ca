"""Checkpoint files: strict reading, complete sets."""

import json
import pickle

import pytest
import torch as th
from tiny import denoiser, network

from guided_diffusion.errors import UserError
from guided_diffusion.runs.checkpoint import (
    complete_checkpoints,
    drop_file,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from guided_diffusion.runs.weights import load_network, load_state_dict
from guided_diffusion.script_util import build_network


@pytest.fixture
def model():
    return build_network(denoiser(**network(8, attention_resolutions="4")))[0]


def test_half_precision_and_the_originals_head_are_read(model, tmp_path):
    state = {k: v.half() for k, v in model.state_dict().items()} | {"out_embed.cls_token": th.ones(1, 1, 128)}
    th.save(state, tmp_path / "student.pt")
    other, _ = build_network(denoiser(**network(8, attention_resolutions="4")))
    head = load_network(other, tmp_path / "student.pt")
    assert list(head) == ["cls_token"]
    for name, value in other.state_dict().items():
        assert value.dtype == th.float32
        assert th.equal(value, state[name].float())


def test_what_does_not_fit_is_told(model, tmp_path):
    state = dict(model.state_dict())
    del state["out.0.weight"]
    state["extra"] = th.zeros(1)
    state["time_embed.0.weight"] = th.zeros(3, 3)
    th.save(state, tmp_path / "wrong.pt")
    with pytest.raises(UserError) as error:
        load_network(model, tmp_path / "wrong.pt")
    message = str(error.value)
    assert "1 missing (out.0.weight)" in message
    assert "1 unexpected (extra)" in message
    assert "time_embed.0.weight (3, 3) instead of (128, 32)" in message
    assert "\n" not in message


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_hostile_and_damaged_files_are_refused(model, tmp_path, capsys):
    path = tmp_path / "file.pt"
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    th.save({"w": Bomb()}, tmp_path / "bomb.pt")
    th.save(model.state_dict(), path)
    data = path.read_bytes()
    (tmp_path / "short.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    th.save([1, 2, 3], tmp_path / "list.pt")
    for name in ("pickle", "bomb", "short", "empty", "text", "list", "absent"):
        with pytest.raises(UserError, match=name):
            load_state_dict(tmp_path / f"{name}.pt")
    assert "executed" not in capsys.readouterr().out


def test_only_complete_sets_count(model, tmp_path):
    def write_pool(path):
        path.write_bytes(b"pool")

    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"model": {"w": th.full((3,), step)}, "pool": write_pool})
    assert newest_checkpoint(tmp_path).step == 30
    assert (tmp_path / "model000030.pt").exists()
    assert (tmp_path / "teacher-state-000030.cache").read_bytes() == b"pool"

    data = bytearray((tmp_path / "model000030.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model000030.pt").write_bytes(data)  # same size, other contents
    assert newest_checkpoint(tmp_path).step == 20
    (tmp_path / "model000020.pt").unlink()
    assert newest_checkpoint(tmp_path).step == 10
    (tmp_path / "checkpoint000010.json").write_text("{")
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)


def test_a_failing_writer_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 10, {"model": {"w": th.ones(1)}, "pool": fail})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model000010.pt"]
    assert complete_checkpoints(tmp_path) == []


def test_dropping_a_file_keeps_the_set_complete(tmp_path):
    save_checkpoint(tmp_path, 10, {"model": {"w": th.ones(1)}, "pool": lambda p: p.write_bytes(b"x")})
    drop_file(complete_checkpoints(tmp_path)[0], "pool")
    (left,) = complete_checkpoints(tmp_path)
    assert left.has("model") and not left.has("pool")
    assert list(json.loads((tmp_path / "checkpoint000010.json").read_text())["files"]) == ["model000010.pt"]


def test_the_originals_checkpoints_without_a_manifest(tmp_path):
    for name in ("model001000.pt", "ema_0.9999_001000.pt", "opt001000.pt", "model002000.pt"):
        th.save({}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / "model001000.pt")
    assert checkpoint.step == 1000
    assert checkpoint.has("ema_0.9999") and checkpoint.has("opt") and not checkpoint.has("head")
    assert open_checkpoint(tmp_path).step == 2000
    with pytest.raises(UserError, match="modelNNNNNN"):
        open_checkpoint(tmp_path / "ema_0.9999_001000.pt")
