"""A run that is watched: scores while training, the best checkpoint, grids beside the teacher's."""

import json

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from PIL import Image
from safetensors.torch import load_file
from test_scripts import assert_same
from tiny import distillation, network, one_line_error, script

from evaluations.evaluator import evaluate
from evaluations.judge import Judge
from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.logger import read_progress
from guided_diffusion.runs.best import add_score, best_checkpoint, read_best, read_score
from guided_diffusion.runs.checkpoint import (
    Retention,
    complete_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from guided_diffusion.runs.checkpoint_writer import CheckpointWriter


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A configuration with its pool, and real digits."""
    folder = tmp_path_factory.mktemp("watching")
    config = distillation(folder, student__dropout=0.1, run__sample_respacing=3)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    np.savez(folder / "digits.npz", load_digit_images()[0][:200])
    return folder, config


def scores(folder, **more):
    keys = {"interval": 2, "samples": 11, "backend": "digits", "reference": folder / "digits.npz"} | more
    return [f"run.eval_{name}={value}" for name, value in keys.items()]


def test_scores_change_nothing_and_the_best_is_kept(project, tmp_path):
    """One run without scores, one with: the same bits. What is scored is what image_sample.py draws."""
    folder, config = project
    kd = ["scripts/image_kd.py", "--config", config, "--exp_dir"]
    script_here(*kd, tmp_path / "plain")
    done = script_here(*kd, tmp_path / "scored", *scores(folder), "run.keep_last=1")
    plain, scored = (newest_checkpoint(tmp_path / name) for name in ("plain", "scored"))
    assert set(scored.files) - set(plain.files) == {"score000006.json"}
    for name in plain.files:
        if not name.endswith(".cache"):
            assert_same(read_torch_file(plain.directory / name), read_torch_file(scored.directory / name))
    assert_same(*(load_file(one.path("pool")) for one in (plain, scored)))

    rows = read_progress(tmp_path / "scored/progress.csv")
    assert [row["step"] for row in rows] == [2, 4, 6]
    columns = {"eval_fd", "eval_precision", "eval_recall", "eval_class_balance", "eval_noise_share"}
    for row, other in zip(rows, read_progress(tmp_path / "plain/progress.csv"), strict=True):
        assert columns <= row.keys() and 0 <= row["eval_precision"] <= 1
        same = other.keys() - {"iterations_per_second", "seconds"}
        assert {name: row[name] for name in same} == {name: other[name] for name in same}
    values = {int(row["step"]): row["eval_fd"] for row in rows}
    for step, value in values.items():
        assert f"step {step}: digits-FD {value:.4g}, " in done.stdout
    assert "(11 samples, " in (tmp_path / "scored/log.txt").read_text()

    best = json.loads((tmp_path / "scored/best.json").read_text())
    step = min(values, key=values.get)
    assert (best["step"], best["metric"], best["value"]) == (step, "digits-FD", values[step])
    assert best["scores"] == {name: value for name, value in rows[step // 2 - 1].items() if "eval" in name}
    assert best["model"] == f"model{step:06d}.pt" and best["scored"] == f"ema_0.99_{step:06d}.pt"
    assert all((tmp_path / "scored" / name).is_file() for name in best["files"])
    assert len(best["files"]) == 3
    assert {c.step for c in complete_checkpoints(tmp_path / "scored")} == {step, 6}

    flags = ["--num_samples", 11, "--batch_size", 4, "--timestep_respacing", 3, "--log_dir", tmp_path / "out"]
    script_here("scripts/image_sample.py", "--model_path", tmp_path / "scored/best.json", *flags)
    said = script_here("scripts/inspect_checkpoint.py", tmp_path / "scored/best.json")
    assert f"--model_path {tmp_path / 'scored' / best['scored']}" in said.stderr
    again = evaluate(folder / "digits.npz", tmp_path / "out/samples_11x16x16x3.npz", backend="digits")
    assert again.fd == pytest.approx(best["value"], rel=1e-3)
    assert again.samples_provenance["model"] == best["scored"]


def test_any_number_of_ranks_scores_the_same_set(project, tmp_path):
    """Weights that stay as they are; 11 samples fill neither the batches of 4 nor those of 2 ranks."""
    folder, config = project
    values = []
    for ranks in (0, 2):
        out = tmp_path / str(ranks)
        flags = ["--config", config, "--exp_dir", out, *scores(folder), "run.iterations=2"]
        if ranks:
            script("scripts/image_kd.py", *flags, "student.lr=1e-12", ranks=ranks)
        else:
            script_here("scripts/image_kd.py", *flags, "student.lr=1e-12")
        (row,) = read_progress(out / "progress.csv")
        values.append(row)
        assert json.loads((out / "best.json").read_text())["value"] == row["eval_fd"]
    for name in ("eval_fd", "eval_precision", "eval_recall", "eval_class_balance", "eval_confidence"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-2), name


def test_a_baseline_is_scored_too(project, tmp_path):
    folder, _ = project
    keys = network(16, lr=1e-3, batch_size=4, ema_rate="")
    config = tmp_path / "train.yaml"
    run = {"iterations": 3, "sample_interval": 3, "num_samples": 2, "sample_respacing": 2}
    config.write_text(yaml.safe_dump(keys | {"run": run}))
    flags = ["--config", config, "--data_dir", folder / "digits.npz", "--exp_dir", tmp_path / "run"]
    script_here("scripts/image_train.py", *flags, *scores(folder))
    steps = [row["step"] for row in read_progress(tmp_path / "run/progress.csv") if "eval_fd" in row]
    assert steps == [2, 3]  # every second, and the last
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert best["scored"] == best["model"]  # there is no average
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"samples000003.png"}


def test_grids_beside_the_teachers(project, tmp_path):
    folder, config = project
    flags = ["--config", config, "--exp_dir", tmp_path, "run.sample_interval=3", "run.num_samples=2"]
    script_here("scripts/image_kd.py", *flags)
    names = {path.name for path in tmp_path.glob("samples*.png")}
    assert names == {
        "samples_teacher.png",
        *(f"samples{kind}{step:06d}.png" for step in (3, 6) for kind in ("", "_raw")),
    }
    assert len({(tmp_path / name).read_bytes() for name in names}) == 5
    first = (tmp_path / "samples_teacher.png").stat().st_mtime_ns
    script_here("scripts/image_kd.py", *flags, "run.iterations=9")
    assert (tmp_path / "samples_raw000009.png").is_file()
    assert (tmp_path / "samples_teacher.png").stat().st_mtime_ns == first
    drawn_again = (tmp_path / "samples000009.png").read_bytes()
    (tmp_path / "samples000009.png").unlink()  # as if stopped between the checkpoint and its grids
    script_here("scripts/image_kd.py", *flags, "run.iterations=10")
    assert (tmp_path / "samples000009.png").read_bytes() == drawn_again
    draw = ["--num_samples", 2, "--timestep_respacing", 3, "--log_dir", tmp_path / "teacher"]
    script_here("scripts/image_sample.py", "--config", config, "--model_path", folder / "teacher.pt", *draw)
    drawn = np.load(tmp_path / "teacher/samples_2x16x16x3.npz")["arr_0"].astype(int)
    grid = np.asarray(Image.open(tmp_path / "samples_teacher.png")).astype(int)
    for number, image in enumerate(drawn):  # the same noise as the samples of that seed
        left = 2 + number * 18
        assert np.abs(grid[2:18, left : left + 16] - image).max() <= 1


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"reference": ""}, "run.eval_interval: scores need run.eval_reference"),
        ({"reference": "absent.npz"}, "run.eval_reference: no such file: absent.npz"),
        ({"samples": 0}, "run.eval_samples must be positive, not 0"),
        ({"samples": 3}, "run.eval_samples must be at least 6, not 3"),
        ({"interval": -1}, "run.eval_interval must be 0 or positive, not -1"),
        ({"backend": "clip"}, "run.eval_backend must be tensorflow, torch or digits, not 'clip'"),
    ],
)
def test_mistakes_are_told_before_training(project, tmp_path, keys, told):
    folder, config = project
    flags = ["--config", config, "--exp_dir", tmp_path / "run", *scores(folder, **keys)]
    refused = script_here("scripts/image_kd.py", *flags, check=False)
    assert told in one_line_error(refused)
    assert newest_checkpoint(tmp_path / "run") is None


def test_digits_are_16x16(project, tmp_path):
    folder, _ = project
    config = distillation(tmp_path, 8)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["--config", config, "--exp_dir", tmp_path / "run", *scores(folder)]
    refused = script_here("scripts/image_kd.py", *flags, check=False)
    assert "digits scores images of 16x16 or 32x32, not of 8x8" in one_line_error(refused)


def test_a_judge_that_fails_costs_the_score_alone(project, tmp_path, monkeypatch):
    def fail(self, images):
        raise UserError("the samples: the network gives NaN or infinity")

    monkeypatch.setattr(Judge, "score", fail)
    folder, config = project
    done = script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path, *scores(folder))
    assert done.stdout.count("could not be scored: the samples: the network gives NaN") == 3
    assert newest_checkpoint(tmp_path).step == 6
    assert not (tmp_path / "best.json").exists()


def score(value, **more):
    return {"metric": "digits-FD", "value": value, "weights": "model", "of": {"samples": 9}} | more


def test_the_best_stays(tmp_path):
    told = []
    writer = CheckpointWriter(tmp_path, told.append, Retention(keep_last=1))
    for step, value in enumerate([3.0, 2.0, 2.5, 2.0, None], 1):
        writer.submit(step, {"model": {"w": th.ones(1)}, "pool": lambda path: path.write_bytes(b"pool")})
        if value is not None:
            writer.add_score(step, score(value))
    writer.close()
    assert [c.step for c in complete_checkpoints(tmp_path)] == [2, 5]  # of equals the oldest
    assert read_best(tmp_path / "best.json") == (2, "model000002.pt")
    assert [c.has("pool") for c in complete_checkpoints(tmp_path)] == [False, True]  # nobody goes on from it
    assert not [line for line in told if "WARNING" in line]
    (tmp_path / "best.json").write_text('{"step": 2, "scored": "../model000002.pt"}')
    with pytest.raises(UserError, match=r"best.json: does not name a checkpoint"):
        read_best(tmp_path / "best.json")


def test_scores_of_another_kind_do_not_compare(tmp_path):
    checkpoints = [save_checkpoint(tmp_path, step, {"model": {"w": th.ones(1)}}) for step in (1, 2, 3, 4)]
    for checkpoint, one in zip(
        checkpoints, [score(1.0, of={"samples": 8}), score(5.0), score(4.0), score(float("nan"))], strict=True
    ):
        add_score(checkpoint, one)
    found = complete_checkpoints(tmp_path)
    assert [read_score(checkpoint) is None for checkpoint in found] == [False, False, False, True]
    assert best_checkpoint(found)[0].step == 3
    (tmp_path / "score000003.json").write_text("{" + (tmp_path / "score000003.json").read_text()[1:-1] + " ")
    assert best_checkpoint(complete_checkpoints(tmp_path))[0].step == 2
