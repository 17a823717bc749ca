"""docs/slurm/distil.sbatch: what SLURM reads of it, and what it runs, on a stand-in for srun."""

import os
import re
import subprocess
import sys

import pytest
from test_launchers import STARTED_BY
from tiny import ROOT, distillation

FILE = ROOT / "docs/slurm/distil.sbatch"

# Starts two ranks here as srun does, with all that it sets; PRETEND gives a script's status instead.
SRUN = """\
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
with open("{log}", "a") as log:
    log.write(" ".join(["srun", *sys.argv[1:]]) + "\\n")
for name, status in (pair.split("=") for pair in os.environ.get("PRETEND", "").split()):
    if name in command[1]:
        sys.exit(int(status))
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}}
ranks = [
    subprocess.Popen(command, env=os.environ | step | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(2)
]
sys.exit(max(rank.wait() for rank in ranks))
"""
WRAPPER = '#!/bin/sh\nexec "{python}" "$0.py" "$@"\n'  # no #!{python}: its path may have spaces
SCONTROL = '#!/bin/sh\necho "scontrol $*" >> {log}\n'


def directives():
    """The options that sbatch reads, which are those before the first command."""
    head = re.split(r"^(?!#|$)", FILE.read_text(), maxsplit=1, flags=re.M)[0]
    pairs = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.M)
    assert len(pairs) == FILE.read_text().count("#SBATCH")
    return dict(pairs)


def test_what_slurm_reads():
    options = directives()
    assert FILE.read_text().startswith("#!/bin/bash\n")
    assert options.keys() <= {
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
        *("signal", "requeue", "open-mode", "output"),
    }
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    ranks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert 256 % ranks == 0  # the batch of the configuration it names
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # to the ranks, not to the batch script (B:)
    assert subprocess.run(["bash", "-n", FILE]).returncode == 0


@pytest.fixture
def sbatch(tmp_path):
    """Runs the file as SLURM does; gives what came of it, and what srun and scontrol were given."""
    log = tmp_path / "log"
    for name, text in (("srun", WRAPPER), ("srun.py", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable, log=log))
        path.chmod(0o755)
    config = distillation(tmp_path, image_size=8, run__iterations=2)
    kept = {name: value for name, value in os.environ.items() if name not in STARTED_BY}

    def run(*overrides, **environment):
        paths = {"PYTHON": sys.executable, "CONFIG": str(config), "RUN": str(tmp_path / "run")}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = kept | paths | {"PATH": path, "SLURM_JOB_ID": str(os.getpid())} | environment
        environment |= {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", FILE, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        return done, log.read_text()

    return run


@pytest.mark.slow
def test_a_run_finishes(sbatch, tmp_path):
    done, log = sbatch("student.lr=1e-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) (launcher: slurm)" in done.stdout
    assert (tmp_path / "run/model000002.pt").is_file()
    assert "lr: 0.0001" in (tmp_path / "run/config.yaml").read_text()
    assert log.count("srun --kill-on-bad-exit=1") == 2
    assert "scontrol" not in log


@pytest.mark.parametrize(
    "script, pretend",
    [("dynamic_prepare", "dynamic_prepare=75"), ("image_kd", "dynamic_prepare=0 image_kd=75")],
)
def test_a_stopped_job_is_queued_again(sbatch, script, pretend):
    done, log = sbatch(PRETEND=pretend)
    assert done.returncode == 75
    assert log.endswith(f"scontrol requeue {os.getpid()}\n")
    assert f"{script}.py" in log.splitlines()[-2]


def test_a_job_that_fails_is_not(sbatch):
    done, log = sbatch(PRETEND="dynamic_prepare=1")
    assert done.returncode == 1
    assert "scontrol" not in log and "image_kd" not in log
