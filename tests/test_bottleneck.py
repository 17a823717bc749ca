"""The distance of the student's bottleneck from the teacher's: what is compared, what is refused."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch as th
from in_process import script_here
from test_weight_selection import KINDS, build, doubled, inputs
from tiny import T, denoiser, distillation, give_student_dit_keys, network, one_line_error, script, teacher_of

from guided_diffusion.config.settings import Distill
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.errors import UserError
from guided_diffusion.networks.diffusers_unet2d import DiffusersUNet2D
from guided_diffusion.networks.guidance import guided
from guided_diffusion.networks.weight_selection import bottleneck_channels
from guided_diffusion.runs.weights import load_state_dict
from guided_diffusion.script_util import build_network

SIZE = 8


@pytest.mark.parametrize("kind", KINDS)
@th.no_grad()
def test_channels_are_those_the_student_would_start_from(kind):
    """A teacher with every channel of the student's twice has a bottleneck that is the student's, twice."""
    small = build(32, **KINDS[kind])
    large = doubled(small, build(64, **KINDS[kind]))
    index = bottleneck_channels(large.selectable_weights(), small.selectable_weights())
    given = inputs(small)
    theirs, ours = large.evaluate(*given).bottleneck, small.evaluate(*given).bottleneck
    smallest = SIZE // 2 ** (len(small.widths) - 1)
    assert ours.shape == (5, small.widths[-1], smallest, smallest) and ours.dtype == th.float32
    th.testing.assert_close(theirs[:, index], ours, rtol=1e-3, atol=1e-4)


@th.no_grad()
def test_it_is_the_same_map_in_diffusers_network_and_the_labels_own_in_a_guided_one():
    adm = build(32)
    exported = adm.for_diffusers()
    theirs = DiffusersUNet2D(exported.config).eval()
    theirs.load_state_dict(exported.state)
    given = inputs(adm)
    expected = adm.evaluate(*given).bottleneck
    th.testing.assert_close(theirs.evaluate(*given).bottleneck, expected, rtol=1e-4, atol=1e-5)

    classes = build(32, class_cond=True, num_classes=3, null_class=True)
    x, t, y = inputs(classes)
    expected = classes.evaluate(x, t, y).bottleneck
    th.testing.assert_close(guided(classes, 2.0).evaluate(x, t, y).bottleneck, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_what_it_adds():
    """Nothing for the teacher itself; else the relative squared distance of each sample, in stage 1 alone."""
    _, process = build_network(denoiser(**network(SIZE)))
    teacher = teacher_of(build(64), process)
    pool = DynamicBatch.of_noise(6, (3, SIZE, SIZE), T)
    batch = pool.advance(th.arange(6), teacher, bottleneck=True)
    assert batch.features is None
    settings = Distill(bottleneck_weight=0.5, stage1_weight=0.0, stage2_weight=1.0)

    itself = Distillation(teacher.network, process, settings, teacher=teacher)
    first, second = itself.passes(teacher.network, batch)
    th.testing.assert_close(first.terms["stage1_bottleneck"], th.zeros(6), rtol=0, atol=1e-8)
    assert "stage2_bottleneck" not in second.terms

    student = build(32)
    first, second = Distillation(student, process, settings, teacher=teacher).passes(student, batch)
    out = student.evaluate(batch.x_t, batch.t)
    theirs = batch.bottleneck[:, ::2]
    expected = (out.bottleneck - theirs).square().sum((1, 2, 3)) / theirs.square().sum((1, 2, 3))
    th.testing.assert_close(first.terms["stage1_bottleneck"], expected)
    without = Distillation(student, process, Distill(stage1_weight=0.0), teacher=teacher)
    plain, other = without.passes(student, batch)
    th.testing.assert_close(first.loss, plain.loss + 0.5 * expected)
    th.testing.assert_close(second.loss, other.loss)
    (joined,) = Distillation(
        student,
        process,
        Distill(bottleneck_weight=0.5, stage1_weight=0.0, stage2_fraction=0.5),
        teacher=teacher,
    ).passes(student, batch)
    th.testing.assert_close(joined.parts[0].terms["stage1_bottleneck"], expected)


def test_a_network_that_hands_none_out_is_told(monkeypatch):
    _, process = build_network(denoiser(**network(SIZE)))
    teacher = teacher_of(build(64), process)
    batch = DynamicBatch.of_noise(2, (3, SIZE, SIZE), T).advance(th.arange(2), teacher, bottleneck=True)
    student = build(32)
    objective = Distillation(student, process, Distill(bottleneck_weight=0.1), teacher=teacher)
    evaluate = student.evaluate
    silent = lambda *given, **more: replace(evaluate(*given, **more), bottleneck=None)  # noqa: E731
    monkeypatch.setattr(student, "evaluate", silent)
    with pytest.raises(UserError, match=r"distill\.bottleneck_weight: .* hands out no bottleneck; give 0"):
        next(objective.passes(student, batch))


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_match_it_and_go_on_exactly(tmp_path, ranks):
    """With outputs used twice, so that a stopped run's file must hold the teacher's maps; by Muon."""
    more = {"distill__bottleneck_weight": 0.1, "distill__teacher_interval": 2, "student__num_channels": 16}
    config = distillation(tmp_path, SIZE, **more, student__microbatch=1, run__optimizer="muon")
    script_here("scripts/dynamic_prepare.py", "--config", config)
    distil = partial(script, ranks=ranks) if ranks else script_here
    kd = ["scripts/image_kd.py", "--config", config, "student.save_interval=3", "student.log_interval=1"]
    done = distil(*kd, "--exp_dir", tmp_path / "whole")
    assert "bottleneck x 0.1" in done.stdout
    header, *rows = (tmp_path / "whole/progress.csv").read_text().splitlines()
    column = header.split(",").index("stage1_bottleneck")
    assert len(rows) == 6 and all(float(row.split(",")[column]) > 0 for row in rows)
    resume = ["--resume_checkpoint", tmp_path / "whole/model000003.pt", "--exp_dir", tmp_path / "again"]
    distil(*kd, *resume)
    one, two = (load_state_dict(tmp_path / run / "model000006.pt") for run in ("whole", "again"))
    assert all(th.equal(one[name], two[name]) for name in one)
    # What was kept of a run without it is not used in one with it, nor the other way round.
    distil(*kd, *resume[:2], "--exp_dir", tmp_path / "off", "distill.bottleneck_weight=0")
    resume = ["--resume_checkpoint", tmp_path / "off/model000006.pt", "--exp_dir", tmp_path / "on"]
    distil(*kd, *resume, "run.iterations=8")


@pytest.mark.parametrize(
    "override, told",
    [
        ("student.num_channels=64", "the bottleneck's 64 channels do not cover 128; give 0"),
        ("student.channel_mult=1", "the larger network has 2 levels, the smaller 1; give 0"),
        ("student.architecture=dit", "the two networks are of different kinds; give 0"),
        ("distill.bottleneck_weight=-1", "must be 0 or positive, not -1"),
    ],
)
def test_students_without_the_teachers_bottleneck_are_refused(prepared_at_8, tmp_path, override, told):
    config = Path(shutil.copy(prepared_at_8, tmp_path))
    if override.endswith("dit"):
        give_student_dit_keys(config, SIZE)
    flags = ["--config", config, "--exp_dir", tmp_path / "run", "distill.bottleneck_weight=0.1", override]
    error = one_line_error(script_here("scripts/image_kd.py", *flags, check=False))
    assert "distill.bottleneck_weight" in error and told in error
