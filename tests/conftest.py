"""Shared by all tests."""

import torch as th

# As the reference numbers were made: on one thread our networks give the originals' very bits, and
# chains amplify the last digit of the first, noisiest step ten-thousandfold.
th.set_num_threads(1)
