"""Shared by all tests."""

import torch as th

th.set_num_threads(2)
