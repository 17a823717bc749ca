"""Losses and gradients that are not finite, scales that overflow, norms that explode."""

import contextlib
import json
from contextlib import nullcontext

import pytest
import torch as th
from driver import distil, rows

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.errors import UserError
from guided_diffusion.logger import RunLog
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.setups.distillation import distillation_loop


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("numerical"))


def build(command, folder, *overrides):
    experiment = load_experiment(command[2], ["student.log_interval=1", *overrides])
    teacher = experiment.teacher
    return distillation_loop(
        experiment,
        weights=teacher.model_path,
        pool_path=teacher.tempfile,
        batch_size=experiment.student.training.batch_size,
        log=RunLog(folder),
    )


def spoil(loop, steps, value=float("nan")):
    """Make the loss of some steps NaN, or so large that the gradients overflow."""
    inner = loop.objective.passes

    def passes(model, batch):
        for out in inner(model, batch):
            factor = value if loop.step in steps else 1.0
            yield type(out)(out.loss * factor, out.terms, out.t)

    loop.objective.passes = passes


def weights(loop):
    """Copies of the weights, then of their averages."""
    averages = (average for ema in loop.emas.values() for average in ema.average)
    return [value.detach().clone() for value in (*loop.parameters, *averages)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_bad_steps_are_skipped_and_counted(command, tmp_path, value, optimizer):
    loop = build(command, tmp_path, "student.weight_decay=0.1", f"run.optimizer={optimizer}")
    spoil(loop, {2, 3}, value)
    seen = []
    inner = loop.train_step

    def watched(batch):
        before = weights(loop)
        inner(batch)
        same = [th.equal(a, b) for a, b in zip(before, weights(loop), strict=True)]
        assert all(same) or not all(same[: len(loop.parameters)])  # the averages follow the weights
        seen.append(all(same))

    loop.train_step = watched
    loop.run()
    assert seen == [False, False, True, True, False, False]
    assert [float(row["skipped"]) for row in rows(tmp_path)] == [0, 0, 1, 1, 0, 0]
    assert all(float(row["grad_norm"]) > 0 for i, row in enumerate(rows(tmp_path)) if i not in (2, 3))
    assert all(value.isfinite().all() for value in weights(loop))
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {4}
    assert float(loop.bad_steps) == 0


def test_too_many_bad_steps_end_the_run(command, tmp_path):
    loop = build(command, tmp_path, "run.max_bad_steps=3", "student.log_interval=100", "run.iterations=50")
    spoil(loop, range(5, 100))
    with pytest.raises(
        UserError, match=r"not finite for \d+ iterations in a row.*earlier checkpoints are kept"
    ):
        loop.run()
    assert 8 <= loop.step < 11
    good = newest_checkpoint(tmp_path)
    assert good.step in (4, 8)
    assert all(v.isfinite().all() for v in th.load(good.path("model"), weights_only=True).values())
    record = json.loads((tmp_path / f"bad-step{loop.step:06d}.json").read_text())
    assert record["step"] == loop.step
    assert (
        "non-finite" in record["batch"]["x_t"] and "0 non-finite" not in record["gradients"]["out.2.weight"]
    )


def test_few_bad_steps_now_and_then_do_not(command, tmp_path):
    loop = build(command, tmp_path, "run.max_bad_steps=3", "run.iterations=9")
    spoil(loop, {0, 1, 3, 4, 6, 7})
    loop.run()
    assert loop.step == 9


def test_float16_lowers_the_scale_to_a_floor(command, tmp_path):
    loop = build(command, tmp_path, "run.precision=fp16", "run.iterations=6")
    assert loop.scaler.get_scale() == 2.0**20
    loop.network.use_dtype(th.float32)  # the scaler is what is looked at; on a CPU float16 is slow
    loop.scaler.scale(th.ones(()))  # which makes its tensors
    loop.scaler.update(8.0)
    spoil(loop, range(6))
    with contextlib.suppress(UserError):
        loop.run()
    assert loop.scaler.get_scale() == 1.0  # six halvings would have made it an eighth
    assert sum(float(row["skipped"]) for row in rows(tmp_path)) == 6
    assert "loss_scale" in rows(tmp_path)[0]
    assert all(value.isfinite().all() for value in weights(loop))


@pytest.mark.parametrize("scale, ends", [(2.0**20, "finished"), (1.0, "failed")])
def test_a_short_run_may_still_look_for_its_loss_scale(command, tmp_path, scale, ends):
    """As ADM's runs do in their first iterations, none of which moves the weights."""
    loop = build(command, tmp_path, "run.precision=fp16", "run.iterations=2")
    loop.network.use_dtype(th.float32)
    loop.scaler.scale(th.ones(()))
    loop.scaler.update(scale)
    spoil(loop, range(2))
    with nullcontext() if ends == "finished" else pytest.raises(UserError, match="2 iterations in a row"):
        loop.run()


def test_clipping_caps_the_norm(command, tmp_path):
    norms = {}
    for clip in (0, 0.01):
        (tmp_path / str(clip)).mkdir()
        loop = build(command, tmp_path / str(clip), f"run.grad_clip={clip}", "run.iterations=1")
        loop.run()
        norms[clip] = th.stack([p.grad.norm() for p in loop.parameters if p.grad is not None]).norm().item()
    assert norms[0] > 0.01
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)
    told = [float(rows(tmp_path / str(clip))[0]["grad_norm"]) for clip in norms]
    assert told[0] == told[1] == pytest.approx(norms[0], rel=1e-5)  # the log has the norm before clipping


def test_ema_warm_up(command, tmp_path):
    loop = build(command, tmp_path, "run.ema_warmup=true", "run.iterations=1")
    start = weights(loop)
    loop.run()
    average = loop.emas[0.99].average
    expected = [0.1 * a + 0.9 * b.detach() for a, b in zip(start, loop.parameters, strict=False)]
    for a, b in zip(average, expected[: len(average)], strict=True):
        th.testing.assert_close(a, b)
