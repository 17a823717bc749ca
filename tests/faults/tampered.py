"""Run a script with a fault on rank 1: `mpiexec -n 2 python tampered.py FAULT SCRIPT ARGUMENTS...`."""

import os
import runpy
import signal
import sys

from guided_diffusion import dist_util, train_util
from guided_diffusion.errors import UserError
from guided_diffusion.runs import run_directory

fault, sys.argv = sys.argv[1], sys.argv[2:]
inner = train_util.TrainLoop._optimizer_step


def faulty(loop):
    if loop.step == 2 and dist_util.rank() == 1:
        if fault == "exception":
            raise ValueError("a fault on rank 1")
        if fault == "mistake":
            raise UserError("a mistake on rank 1")
        os.kill(os.getpid(), getattr(signal, fault))
    return inner(loop)


train_util.TrainLoop._optimizer_step = faulty
run_directory.save_curves = lambda *_: None
runpy.run_path(sys.argv[0], run_name="__main__")
