"""Running a study: every cell's commands and scores, beside each other, resumably."""

import fnmatch
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..errors import UserError
from ..io.files import held
from ..processes.stopping import Stopped, StopSignals
from ..runs.provenance import git_revision
from ..script_util import build_process
from .cell_run import CellRun, ScoreFiles, Shared
from .cells import Cell, cells_of
from .commands import Steps, StudyStopped
from .results import Results
from .study_file import Study


class Runner:
    """Runs what of a study has no result yet.

    Args:
        study: the study.
        out: where all of it is written.
        root: the project's folder.
        results: what is known already, and where results are added.
        score: gives the scores of an npz of samples by name, from the reference's npz and it.
        jobs: cells at a time.
    """

    def __init__(self, study: Study, out: Path, root: Path, results: Results, score: ScoreFiles, jobs: int):
        self.study, self.out, self.results, self.jobs = study, out, results, jobs
        self.shared = Shared(study, out, root, score)
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._about: dict[str, Any] = {"revision": git_revision()}

    def run(self, only: Sequence[str] = ()) -> list[str]:
        """Run all cells, or those whose run's or own name has one of the patterns `only`, in their order.

        Returns:
            A line for each cell that failed for another reason than that training diverged, and so has no
            result; the next time it is tried again.

        Raises:
            Stopped: a signal asked to stop; what was done is kept.
            UserError: another process is running a study in the same folder, or no cell has such a name.
        """
        dist_util.setup_dist()  # which chooses the number of threads
        self._about["machine"] = machine(self.jobs)
        self.out.mkdir(parents=True, exist_ok=True)
        with held(self.out):
            # Of budgets in seconds: what they have bought before, so that all seeds get the same.
            for record in self.results.read().values():
                if bought := record["iterations"]:  # 0: it diverged in its trial
                    for kind, amount in record["spent"].items():
                        self.shared.iterations.done[f"{record['digest']} {amount:g} {kind}"] = bought
            self._waiting = self._missing(only)
            self._open = list(self._waiting)  # not finished
            print(
                f"{self.study.name}: {len(self._waiting)} cells to run, {self.jobs} at a time, in {self.out}"
            )
            with StopSignals() as signals:
                threads = [
                    threading.Thread(target=self._work) for _ in range(min(self.jobs, len(self._waiting)))
                ]
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    time.sleep(0.2)
                    if signals.received:
                        self.shared.commands.stop()
                if signals.received and self._open:
                    raise Stopped(f"stopped by {signals.received} with {len(self._open)} cells to go")
        return self.failures

    def _missing(self, only: Sequence[str]) -> list[Cell]:
        known, every = self.results.read(), [*cells_of(self.study)]
        cells: dict[str, Cell] = {}
        for pattern in only or ["*"]:
            named = [cell for cell in every if _matches(cell, pattern)]
            if not named:
                raise UserError(f"{self.study.path}: no run or cell is named {pattern}")
            for cell in named:
                if cell.id not in known or self._can_extend(cell, known[cell.id]):
                    cells.setdefault(cell.id, cell)
        self._require_respacings({cell.run.name for cell in cells.values()})
        return list(cells.values())

    def _can_extend(self, cell: Cell, record: dict[str, Any]) -> bool:
        return self.study.metrics.to_teacher and CellRun(self.shared, cell).can_extend(record)

    def _require_respacings(self, names: set[str]) -> None:
        """Refuse sampling steps that a run's process has not.

        Raises:
            UserError: a run is to be sampled in steps that its networks do not know.
        """
        for name in names:
            run = self.study.runs[name]
            teacher, where = self.study.experiment(run).teacher, f"{self.study.path}: runs.{name}"
            known = {*build_process(teacher, f"{where}: teacher.timestep_respacing").timestep_map}
            wanted = {"metrics.respacing": self.study.metrics.respacing}
            if run.data is not None:
                wanted["data.respacing"] = run.data.respacing
            for key, respacing in wanted.items():
                if not known >= {*build_process(teacher, f"{where}: {key}", respacing).timestep_map}:
                    told = f"the networks know the {len(known)} steps of teacher.timestep_respacing alone"
                    raise UserError(f"{where}: {key} '{respacing}': {told}")

    def _work(self) -> None:
        """Run cells until there are none left: a thread's life."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                cell = self._waiting.pop(0)
            try:
                self._run(cell)
                with self._lock:
                    self._open.remove(cell)
                self._tidy()
            except StudyStopped:
                return
            except Exception as error:
                told = f"{cell.name}: {error if isinstance(error, UserError | OSError) else repr(error)}"
                print(f"FAILED {told}", file=sys.stderr, flush=True)
                if not isinstance(error, UserError | OSError):
                    sys.excepthook(type(error), error, error.__traceback__)
                self.failures.append(told)

    def _run(self, cell: Cell) -> None:
        """Run a cell and add its record, or extend the one that it has."""
        _say(f"{cell.name}: started")
        started = time.monotonic()
        if known := self.results.read().get(cell.id):
            known = CellRun(self.shared, cell).extended(known)
            self.results.append(known)
            _say(f"{cell.name}: extended in {time.monotonic() - started:.0f} s")
            return
        record: dict[str, Any] = {"id": cell.id, "digest": cell.digest, "run": cell.run.name}
        record |= {"budget": cell.budget.name, "spent": {cell.budget.kind: cell.budget.amount}}
        record |= {"seed": cell.seed, "overrides": list(cell.run.overrides)}
        record |= self._about | CellRun(self.shared, cell).run()
        self.results.append(record)
        told = record.get("failed") or f"{record['scores'][-1]['primary']:.4g}"
        _say(f"{cell.name}: done in {time.monotonic() - started:.0f} s: {told}")

    def _tidy(self) -> None:
        """Remove the pools and images that no cell needs any more."""
        if self.study.keep == "all":
            return
        with self._lock:
            seeds = {cell.seed for cell in self._open} | {-1}
            for kind in ("pools", "data", "teacher"):
                for path in self.out.glob(f"{kind}/*/steps.json"):
                    if Steps(path).done["seed"] not in seeds:
                        shutil.rmtree(path.parent)


def machine(jobs: int) -> dict[str, Any]:
    """What times depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": th.get_num_threads(),
        "jobs": jobs,
        "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
        "torch": th.__version__,
    }


def _say(line: str) -> None:
    """Tell a person; in one piece, as several threads do."""
    print(f"{line}\n", end="", flush=True)


def _matches(cell: Cell, pattern: str) -> bool:
    return fnmatch.fnmatchcase(cell.run.name, pattern) or fnmatch.fnmatchcase(cell.name, pattern)


def known_results(study: Study, out: Path, root: Path, fresh: bool) -> Results:
    """The results of a study; with `fresh` only those that lie where it is run."""
    if fresh:
        return Results(out / "results.jsonl")
    own = root / study.results if study.results else out / "results.jsonl"
    committed: Sequence[Path] = [root / f"docs/study/{study.name}.jsonl", out / "results.jsonl"]
    return Results(own, committed)
