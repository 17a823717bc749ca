"""Shared by all tests."""

import os

import pytest
import torch as th
from in_process import script_here
from tiny import distillation

# As the reference numbers were made: on one thread our networks give the originals' very bits, and
# chains amplify the last digit of the first, noisiest step ten-thousandfold.
th.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests run


@pytest.fixture(scope="session")
def prepared_at_8(tmp_path_factory):
    """A tiny configuration of 8x8 samples whose pool is prepared, for tests that change nothing of it."""
    config = distillation(tmp_path_factory.mktemp("prepared"), 8)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    return config


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as "told", such as how many kills a run survived."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {text}")
