"""Shared by all tests."""

import os

import torch as th

# As the reference numbers were made: on one thread our networks give the originals' very bits, and
# chains amplify the last digit of the first, noisiest step ten-thousandfold.
th.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the scripts that tests run


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded as "told", such as how many kills a run survived."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {text}")
