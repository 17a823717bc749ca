"""Golden group G4, training steps: two iterations of the whole loop."""

import golden_checks
import pytest
from golden_checks import STEPS
from golden_data import assert_all


@pytest.mark.parametrize("case", STEPS)
def test_two_steps(case, tmp_path):
    assert_all(golden_checks.two_steps(case, tmp_path))
