"""Run a script with a fault on rank 1: `mpiexec -n 2 python tampered.py FAULT SCRIPT ARGUMENTS...`."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion import dist_util, train_util
from guided_diffusion.errors import UserError
from guided_diffusion.processes import rendezvous, stopping
from guided_diffusion.runs import start
from guided_diffusion.setups import distillation

fault, sys.argv = sys.argv[1], sys.argv[2:]
inner = train_util.TrainLoop._learning_rate


def faulty(loop):
    if fault == "mistake of all":
        raise UserError("a mistake on every rank")
    if loop.step == 2 and dist_util.rank() == 1:
        if fault == "exception":
            raise ValueError("a fault on rank 1")
        if fault == "mistake":
            raise UserError("a mistake on rank 1")
        if fault == "SIGTERM to mpiexec too":
            proxy = os.getppid()
            os.kill(int(Path(f"/proc/{proxy}/stat").read_text().split()[3]), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # for mpiexec to pass it on
        elif fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
    return inner(loop)


def held_up(*_):
    if dist_util.rank() == 1 or fault == "held up, both told":
        subprocess.Popen(["sh", "-c", f"sleep 1; kill {os.getpid()}"])
    if dist_util.rank() == 0:
        dist_util.barrier()
    time.sleep(60)


def told_early():
    if os.environ["PMI_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    return setup_dist()


def failing_early():
    if os.environ["PMI_RANK"] == "1":
        raise ValueError("a fault before the ranks meet")
    return setup_dist()


if fault.startswith("held up"):
    stopping.GRACE = rendezvous._PATIENCE = 2.0
    distillation.load_teacher = held_up
if "early" in fault:
    rendezvous._PATIENCE = 2.0
    setup_dist = dist_util.setup_dist
    dist_util.setup_dist = told_early if fault == "told early" else failing_early
train_util.TrainLoop._learning_rate = faulty
start.save_curves = lambda *_: None
runpy.run_path(sys.argv[0], run_name="__main__")
