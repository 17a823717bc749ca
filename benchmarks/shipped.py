"""The project's commands as a user types them, timed by what they say of their own progress.

Nothing but command lines is used, so any revision that has them can be timed.
"""

import io
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch as th

from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import build_network

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10  # of the sampler
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds; what a process has used is told in these


@dataclass(frozen=True)
class Workload:
    """What the commands are timed on.

    Attributes:
        config: a distillation.
        batch_size: images, in training, preparing and sampling alike.
        stretch: iterations between two lines of the distillation's log.
        repeats: stretches that count, of every command; one before them does not.
        overrides: `key=value` of the configuration.
    """

    config: Path
    batch_size: int = 32
    stretch: int = 10
    repeats: int = 5
    overrides: tuple[str, ...] = ()


class Rate(NamedTuple):
    """Images per second, by the wall's clock and by the processor's, which a busy machine leaves alone."""

    wall: float
    processor: float


def save_random_teacher(experiment: DistillationExperiment, path: Path) -> None:
    """Save a teacher of random weights, as checkpoints of any origin are: a plain state dict."""
    th.manual_seed(0)
    network, _ = build_network(experiment.teacher)
    th.save(network.state_dict(), path)


def checkout(revision: str, folder: Path) -> Path:
    """Unpack a revision of this repository in a new folder.

    Raises:
        UserError: git has no such revision.
    """
    done = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"--compare {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        # Python before 3.10.12 and 3.11.4 has no filters; the archive is our own.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(folder)
    return folder


class Shipped:
    """The commands of one tree on one workload. Every rate is one in steady state.

    Args:
        tree: the root of a checkout.
        folder: for what the commands write.
        workload: what they are timed on; a configuration of this tree's is the other tree's of that name.
        weights: the teacher.
        timesteps: T of the teacher's process.
    """

    def __init__(self, tree: Path, folder: Path, workload: Workload, weights: Path, timesteps: int):
        self._tree, self._folder, self._workload = tree, folder, workload
        folder.mkdir()
        config = workload.config.resolve()
        self._config = tree / config.relative_to(ROOT) if config.is_relative_to(ROOT) else config
        self._stretches = workload.repeats + 1
        self._teacher = (
            f"teacher.model_path={weights}",
            f"teacher.tempfile={folder / 'pool.cache'}",
            f"teacher.BATCH={self._stretches / timesteps}",  # so many batches are the pool
            f"teacher.batch_size={workload.batch_size}",
            f"distill.stride={timesteps}",  # one step for each sample
            f"student.batch_size={workload.batch_size}",
        )

    def prepare(self) -> Rate:
        """Prepare the pool, each sample by one step of the teacher."""
        lines = {r"preparing: (\d+) of": 1, r"(\d+) of \d+ samples are at their level": 1}
        return self._rate(lines, "dynamic_prepare.py", *self._teacher, "--overwrite")

    def distil(self) -> Rate:
        """Distil from the pool, which must be prepared."""
        workload, run = self._workload, self._folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        iterations = workload.stretch * self._stretches
        saves = workload.stretch * max(2, self._stretches // 3)  # most stretches come after one
        return self._rate(
            {r"step (\d+)/": workload.batch_size}, "image_kd.py", *self._teacher, "--exp_dir", run,
            f"run.iterations={iterations}", f"student.log_interval={workload.stretch}",
            f"student.save_interval={saves}", "run.sample_interval=-1",
        )  # fmt: skip

    def sample(self) -> Rate:
        """Sample from the distilled student; an image counts once for each step."""
        size, folder = self._workload.batch_size, self._folder / "samples"
        shutil.rmtree(folder, ignore_errors=True)
        (student, *_) = (self._folder / "run").glob("ema_*.pt")
        return self._rate(
            {r"sampling: (\d+) of": STEPS, r"batch (\d+) of \d+ drawn": size * STEPS},
            "image_sample.py", "--model_path", student,
            "--batch_size", size, "--num_samples", size * self._stretches,
            "--timestep_respacing", STEPS, "--log_dir", folder,
        )  # fmt: skip

    def _rate(self, patterns: dict[str, int], script: str, *arguments: object) -> Rate:
        """Run a command: the median rate between two lines of its log that tell how far it is.

        Args:
            patterns: of these lines, today's and an older tree's; the group is a count, of so many images
                each.
            script: in `scripts/`.
            arguments: besides the configuration and its overrides.

        Raises:
            UserError: the command failed.
        """
        command = [sys.executable, f"scripts/{script}", "--config", self._config, *arguments]
        command = [*map(str, command), *self._workload.overrides]
        environment = os.environ | {"PYTHONPATH": str(self._tree), "TCCD_PROGRESS_SECONDS": "0"}
        lines: list[str] = []
        marks: list[tuple[int, Rate]] = []  # images, and the clocks then
        with subprocess.Popen(
            command, cwd=self._tree, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    for pattern, images in patterns.items():
                        if found := re.search(pattern, line):
                            clocks = Rate(time.perf_counter(), processor_seconds(process.pid))
                            marks.append((images * int(found[1]), clocks))
            except BaseException:
                process.kill()
                raise
        if process.returncode or len(marks) < 2:
            raise UserError(f"{' '.join(command)} failed in {self._tree}:\n{''.join(lines[-20:])}")
        stretches = [
            [(b - a) / max(end - start, TICK) for start, end in zip(before, after, strict=True)]
            for (a, before), (b, after) in pairwise(marks)
        ]
        return Rate(*map(statistics.median, zip(*stretches, strict=True)))


def processor_seconds(pid: int) -> float:
    """What a running process and its threads have used; NaN where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) * TICK  # utime and stime
