"""Golden group G4, losses: stage 1, stage 2, their gradients, and the plain forward with the head."""

import golden_checks
import pytest
from golden_checks import LOSSES, TEACHERS, build_student, parameters_of
from golden_data import assert_all

every_case = pytest.mark.parametrize("case", LOSSES)


@every_case
def test_names_and_shapes_of_the_head(case):
    _, model, objective = build_student(LOSSES[case])
    ours = {name: list(p.shape) for name, p in parameters_of(model, objective).items()}
    assert ours == dict(LOSSES[case]["keys"])


@every_case
def test_plain_forward(case):
    assert_all(golden_checks.plain_forward(case))


@pytest.mark.parametrize("case", TEACHERS)
def test_teacher_step(case):
    assert_all(golden_checks.teacher_step(case))


@every_case
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_stage_losses_and_gradients(case, stage):
    assert_all(golden_checks.stage(case, stage))


@every_case
def test_both_stages_accumulate(case):
    assert_all(golden_checks.both_stages(case))
