"""Running a study: every cell's commands and scores, beside each other, resumably."""

import copy
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.loading import experiment_keys, mapping_text
from ..config.settings import Denoiser, flat
from ..distill.dynamic_batch import pool_size
from ..errors import UserError
from ..io.files import NpzFile, atomic_path, held, sha256_of
from ..io.image_sets import open_images
from ..logger import read_progress
from ..processes.stopping import Stopped, StopSignals
from ..runs.checkpoint import file_name, manifest_step
from ..runs.figures import save_grid
from ..runs.provenance import git_revision
from ..script_util import build_process
from ..setups.distillation import pool_identity
from .cells import Cell, cells_of, reference_path, teacher_path
from .commands import CommandFailed, Commands, Steps, StudyStopped
from .comparison import Comparison, held_out_states
from .ledger import Ledger, ledger_of
from .results import Results
from .study_file import Study

Scorer = Callable[[Path, Path], dict[str, float]]
_DIVERGED = "gradients were not finite"  # what train_util says of a run that gives up
_SHOWN = 16  # samples in the report's pictures
_TIMED_ITERATIONS = 60  # of the trial run that tells how many iterations some seconds are


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

    def __init__(self, study: Study, out: Path, root: Path, results: Results, score: Scorer, jobs: int):
        self.study, self.out, self.results, self.score, self.jobs = study, out, results, score, jobs
        self.commands = Commands(root)
        self.failures: list[str] = []
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()
        self._machine = machine(jobs)
        self._revision = git_revision(root)

    def run(self, only: str = "") -> list[str]:
        """Run all cells, or those of which `only` is a pattern of the run's or the cell's name.

        Returns:
            A line for each cell that failed for another reason than that training diverged, and so has no
            result; the next time it is tried again.

        Raises:
            Stopped: a signal asked to stop; what was done is kept.
            UserError: another process is running a study in the same folder.
        """
        dist_util.setup_dist()
        self.out.mkdir(parents=True, exist_ok=True)
        with held(self.out):
            # Of budgets in seconds: what they have bought before, so that all seeds get the same.
            self.iterations = Steps(self.out / "iterations.json")
            for record in self.results.read().values():
                for kind, amount in record["spent"].items():
                    self.iterations.done[f"{record['digest']} {amount:g} {kind}"] = record["iterations"]
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
                        self.commands.stop()
                if signals.received and self._open:
                    raise Stopped(f"stopped by {signals.received} with {len(self._open)} cells to go")
        return self.failures

    def _missing(self, only: str) -> list[Cell]:
        known = self.results.read()
        cells: dict[str, Cell] = {}
        for cell in cells_of(self.study):
            if cell.id not in known and (not only or _matches(cell, only)):
                cells.setdefault(cell.id, cell)
        return list(cells.values())

    def _work(self) -> None:
        """Run cells until there are none left: a thread's life."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                cell = self._waiting.pop(0)
            try:
                self.results.append(CellRun(self, cell).record())
            except StudyStopped:
                return
            except Exception as error:
                told = f"{cell.name}: {error if isinstance(error, UserError | OSError) else repr(error)}"
                print(f"FAILED {told}", file=sys.stderr, flush=True)
                if not isinstance(error, UserError | OSError):
                    sys.excepthook(type(error), error, error.__traceback__)
                self.failures.append(told)
                continue
            with self._lock:
                self._open.remove(cell)
            self._tidy()

    def _tidy(self) -> None:
        """Remove the pools that no cell needs any more."""
        if self.study.keep == "all":
            return
        with self._lock:
            seeds = {cell.seed for cell in self._open} | {-1}
        for path in (self.out / "pools").glob("*/steps.json"):
            if Steps(path).done["seed"] not in seeds:
                shutil.rmtree(path.parent)

    def once(self, name: str) -> threading.Lock:
        """The lock of something that is made once."""
        with self._lock:
            return self._locks[name]

    @property
    def alone(self) -> threading.Lock:
        """Held by whoever computes in this process: one at a time, as torch's random numbers are common."""
        return self.once("torch")


class CellRun:
    """Runs one cell; what an earlier process has done of it is not done again."""

    def __init__(self, runner: Runner, cell: Cell):
        self.runner, self.cell, self.study = runner, cell, runner.study
        self.folder = runner.out / "cells" / f"{cell.name.replace('/', ',')}-{cell.id[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps = Steps(self.folder / "steps.json")
        self.experiment = self.study.experiment(cell.run, f"run.seed={cell.seed}")
        self.teacher = teacher_path(self.study, self.experiment)
        self.reference = reference_path(self.study)

    def record(self) -> dict[str, Any]:
        """Run it, and describe it."""
        cell, study = self.cell, self.study
        print(f"{cell.name}: started", flush=True)
        started = time.monotonic()
        record: dict[str, Any] = {
            "id": cell.id,
            "run": cell.run.name,
            "budget": cell.budget.name,
            "seed": cell.seed,
            "digest": cell.digest,
            "spent": {cell.budget.kind: cell.budget.amount},
            "overrides": list(cell.run.overrides),
            "revision": self.runner._revision,
            "machine": self.runner._machine,
        }
        data = self._data() if cell.run.data else self._pool()
        with self.runner.alone:
            ledger = ledger_of(self.experiment, cell.run.data, self._images())
        iterations = self._iterations(ledger, data)
        scores: list[dict[str, Any]] = []
        record |= {"iterations": iterations, "flops": ledger.of(iterations)}
        try:
            self._train(iterations, data)
        except CommandFailed as error:
            if _DIVERGED not in str(error):
                raise
            record["failed"] = str(error)
        else:
            scores = [self._scores(step, iterations) for step in study.points(iterations)]
        record["seconds"] = {
            "preparation": data.seconds,
            **{name: self.steps.seconds(name) for name in ("train", "sample", "score")},
        }
        record["scores"] = scores
        if study.keep == "little":
            self._tidy(iterations)
        final = f", {scores[-1]['primary']:.4g}" if scores else f", FAILED: {record.get('failed')}"
        print(f"{cell.name}: done in {time.monotonic() - started:.0f} s{final}", flush=True)
        return record

    def _command(self, script: str, *arguments: object) -> None:
        self.runner.commands.run(self.folder / "commands.log", script, *arguments)

    # What a run trains on

    def _pool(self) -> "Prepared":
        """The pool of this seed and configuration, prepared once for all cells that share it."""
        experiment, training = self.experiment, self.experiment.student.training
        if experiment.teacher.iter_choice == "iterative_distillation":
            return Prepared(self.folder / "none.cache", 0.0)
        total = build_process(experiment.teacher, "teacher.timestep_respacing").num_timesteps
        teacher = experiment.teacher
        size = pool_size(teacher.iter_choice, teacher.BATCH, total, training.batch_size)
        identity = pool_identity(experiment, self.teacher, size)
        identity |= {"rows": teacher.batch_size, "dtype": experiment.distill.pool_dtype}
        folder = self.runner.out / "pools" / _key(identity)
        tempfile = folder / "pool.cache"
        with self.runner.once(str(folder)):
            steps = Steps(folder / "steps.json")
            if "prepared" not in steps.done:
                folder.mkdir(parents=True, exist_ok=True)
                steps.add("seed", self.cell.seed if experiment.distill.pool_seed == -1 else -1)
                config = self._config(folder / "pool.yaml", tempfile)
                with steps.timed("prepare"):
                    self._command("scripts/dynamic_prepare.py", "--config", config)
                steps.add("prepared")
            return Prepared(tempfile, steps.seconds("prepare"))

    def _data(self) -> "Prepared":
        """The images of this seed and recipe, made once for all cells that share them."""
        data, cell = self.cell.run.data, self.cell
        assert data is not None
        if data.real == 1:
            return Prepared(self.reference, 0.0)
        teacher = self.experiment.teacher
        content = {"teacher": sha256_of(self.teacher), "settings": _denoiser(teacher), "seed": cell.seed}
        content |= {"real": data.real, "respacing": data.respacing, "reference": sha256_of(self.reference)}
        folder = self.runner.out / "data" / _key(content)
        mixed = folder / "mixed.npz"
        with self.runner.once(str(folder)):
            steps = Steps(folder / "steps.json")
            if "mixed" not in steps.done:
                images = self._images()
                count = images - round(data.real * images)
                folder.mkdir(parents=True, exist_ok=True)
                config = folder / "teacher.yaml"
                with atomic_path(config) as temporary:
                    run = flat(self.experiment.run) | {"seed": _noise_seed(cell.seed, 99)}
                    temporary.write_text(mapping_text(_denoiser(teacher) | {"run": run}))
                with steps.timed("prepare"):
                    self._command(
                        *("scripts/image_sample.py", "--config", config, "--model_path", self.teacher),
                        *("--num_samples", count, "--batch_size", self.study.metrics.batch_size),
                        *("--timestep_respacing", data.respacing, "--log_dir", folder / "teacher"),
                    )
                    synthetic = next((folder / "teacher").glob("samples_*.npz"))
                    self._command(
                        *("datasets/mix.py", "--real", self.reference, "--synthetic", synthetic),
                        *("--ratio", data.real, "--seed", cell.seed, "--out", mixed),
                    )
                steps.add("mixed")
            return Prepared(mixed, steps.seconds("prepare"))

    def _images(self) -> int:
        """How many real images there are; 0 where nobody asks."""
        if self.cell.run.data is None:
            return 0
        return open_images(NpzFile(self.reference), at_least=1).count

    # How long, and the training itself

    def _iterations(self, ledger: Ledger, data: "Prepared") -> int:
        """What the budget buys, a multiple of the study's divisor; the same for all seeds."""
        budget = self.cell.budget
        if budget.kind == "iterations":
            return int(budget.amount)
        if budget.kind == "flops":
            return self._whole(budget.amount - ledger.preparation, ledger.iteration)
        name = f"{self.cell.digest} {budget.amount:g} seconds"
        with self.runner.once(name):
            if (known := self.runner.iterations.done.get(name)) is not None:
                return known
            iterations = self._whole(budget.amount - data.seconds, self._seconds_per_iteration(data))
            self.runner.iterations.add(name, iterations)
            return iterations

    def _whole(self, left: float, unit: float) -> int:
        """How many iterations of a unit's cost are left, rounded down to a multiple of the study's divisor.

        Raises:
            UserError: none.
        """
        divisor = self.study.divisor
        count = int(left / unit) // divisor * divisor
        if count < divisor:
            raise UserError(
                f"budgets.{self.cell.budget.name}: does not pay for {divisor} iterations of "
                f"{self.cell.run.name} after its preparation; give a larger one"
            )
        return count

    def _seconds_per_iteration(self, data: "Prepared") -> float:
        """Measured by a short run, the first sixth of which is not counted."""
        folder = self.folder / "trial"
        config = self._config(self.folder / "trial.yaml", data.path, _TIMED_ITERATIONS, log_interval=10)
        self._run_training(config, data, folder)
        rows = read_progress(folder / "progress.csv")
        shutil.rmtree(folder)
        first, last = rows[0], rows[-1]
        spent = [row["step"] / row["iterations_per_second"] for row in (first, last)]
        return (spent[1] - spent[0]) / (last["step"] - first["step"])

    def _train(self, iterations: int, data: "Prepared") -> None:
        if "trained" in self.steps.done:
            return
        config = self._config(self.folder / f"{self.cell.run.name}.yaml", data.path, iterations)
        with self.steps.timed("train"):
            self._run_training(config, data, self.folder / "run")
        self.steps.add("trained")

    def _run_training(self, config: Path, data: "Prepared", folder: Path) -> None:
        """The command that trains."""
        if self.cell.run.data is None:
            self._command("scripts/image_kd.py", "--config", config, "--exp_dir", folder)
        else:
            where = ["--data_dir", data.path, "--exp_dir", folder]
            self._command("scripts/image_train.py", "--config", config, *where)

    def _config(self, path: Path, tempfile: Path, iterations: int = 0, log_interval: int = 0) -> Path:
        """Write the configuration of a command, resolved, with everything that the study decides in it."""
        experiment, data = copy.deepcopy(self.experiment), self.cell.run.data
        training, run = experiment.student.training, experiment.run
        experiment.teacher.model_path, experiment.teacher.tempfile = str(self.teacher), str(tempfile)
        training.log_interval = log_interval or training.log_interval
        if iterations:
            training.lr_anneal_steps = iterations if training.lr_anneal_steps else 0
            training.save_interval = iterations // self.study.divisor
            run.iterations, run.sample_interval, run.keep_last = iterations, -1, 0
        if data is not None:
            training.random_flip = data.random_flip
        text = flat(experiment.student) | {"run": flat(run)} if data else experiment_keys(experiment)
        with atomic_path(path) as temporary:
            temporary.write_text(mapping_text(text))
        return path

    # Scores

    def _scores(self, step: int, iterations: int) -> dict[str, Any]:
        """All scores of the averaged weights after so many iterations."""
        name = f"scores {step}"
        if name in self.steps.done:
            return self.steps.done[name]
        metrics, commands = self.study.metrics, self.runner.commands
        weights = self.folder / "run" / file_name(self._weights, step)
        found: dict[str, Any] = {"step": step, "fraction": step / iterations, "sets": []}
        for number in range(metrics.sets):
            folder = self.folder / f"samples-{step}-{number}"
            with self.steps.timed(f"sample {step}"):
                self._command(
                    *("scripts/image_sample.py", "--config", self.folder / f"{self.cell.run.name}.yaml"),
                    *("--model_path", weights, "--num_samples", metrics.samples),
                    *("--batch_size", metrics.batch_size, "--timestep_respacing", metrics.respacing),
                    *("--log_dir", folder, f"run.seed={_noise_seed(self.cell.seed, number)}"),
                )
            images = next(folder.glob("samples_*.npz"))
            with self.runner.alone, self.steps.timed(f"score {step}"):
                commands.check()
                found["sets"].append(self.score(images))
            if step == iterations and not number:
                shown = NpzFile(images).load("arr_0")[:_SHOWN]
                save_grid(
                    self.folder / "pictures.png", shown, columns=_SHOWN, scale=max(1, 32 // shown.shape[1])
                )
        first = found["sets"][0]
        found |= {key: sum(one[key] for one in found["sets"]) / metrics.sets for key in first}
        found["primary"] = found[next(key for key in ("fd", "fid") if key in first)]
        with self.runner.alone, self.steps.timed(f"score {step}"):
            found |= self._compared(weights)
        self.steps.add(name, found)
        return found

    @property
    def _weights(self) -> str:
        """What of a checkpoint is scored: the first average, or else the weights themselves."""
        rates = self.experiment.student.training.ema_rates
        return f"ema_{rates[0]}" if rates else "model"

    def score(self, images: Path) -> dict[str, float]:
        """The scores of an npz of samples."""
        return self.runner.score(self.reference, images)

    def _compared(self, weights: Path) -> dict[str, Any]:
        """What `Comparison` finds, as far as the study asks for it."""
        metrics, check = self.study.metrics, self.runner.commands.check
        found: dict[str, Any] = {}
        comparison = Comparison(self.experiment, self.teacher, weights)
        if metrics.held_out:
            content = {"teacher": sha256_of(self.teacher), "settings": _denoiser(self.experiment.teacher)}
            cache = self.runner.out / "states" / f"{_key(content | {'count': metrics.held_out})}.safetensors"
            states = held_out_states(self.experiment, self.teacher, metrics.held_out, cache, check)
            found["held_out"] = comparison.held_out(states)
        if metrics.chains:
            chain = comparison.own_chain(metrics.chains, metrics.respacing, check)
            found |= {"on_policy": chain["eps"], "path_kl": chain["path_kl"]}
        return found

    def _tidy(self, iterations: int) -> None:
        """Remove what is large, but the last averaged weights and the first set's grid."""
        for path in (self.folder / "run").iterdir():
            large = path.suffix in (".pt", ".cache") or manifest_step(path.name) is not None
            if large and path.name != file_name(self._weights, iterations):
                path.unlink()
        for folder in self.folder.glob("samples-*"):
            if folder.name == f"samples-{iterations}-0":
                for path in folder.glob("samples_*.npz"):
                    path.unlink()
            else:
                shutil.rmtree(folder)


class Prepared:
    """Where what a run trains on lies, and how long making it took."""

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds


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


def _matches(cell: Cell, pattern: str) -> bool:
    return fnmatch.fnmatch(cell.run.name, pattern) or fnmatch.fnmatch(cell.name, pattern)


def _noise_seed(seed: int, number: int) -> int:
    """The seed of a set of samples: another one for each of a study's seeds and each set."""
    return 1000 + 100 * seed + number


def _denoiser(denoiser: Denoiser) -> dict[str, Any]:
    return flat(denoiser.architecture) | flat(denoiser.process)


def _key(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def known_results(study: Study, out: Path, root: Path) -> Results:
    """The results of a study: its own file, and those that came with the repository."""
    own = root / study.results if study.results else out / "results.jsonl"
    committed: Sequence[Path] = [root / f"docs/study/{study.name}.jsonl", out / "results.jsonl"]
    return Results(own, committed)
