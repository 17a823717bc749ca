"""Running one cell of a study: what it trains on, its training, its samples and scores."""

import copy
import hashlib
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import dist_util
from ..config.loading import experiment_keys, mapping_text
from ..config.settings import flat
from ..distill.dynamic_batch import pool_size
from ..errors import UserError
from ..io.files import sha256_of, write_text
from ..io.image_sets import open_images
from ..io.model_folder import weights_sha256
from ..io.npz_reader import NpzFile
from ..logger import read_progress
from ..runs.checkpoint import file_name, manifest_step
from ..runs.figures import save_grid
from ..script_util import build_process, build_space
from ..setups.pools import pool_identity
from ..train_util import DIVERGED
from .cells import Cell, model_path, reference_path
from .commands import CommandFailed, Commands, Steps
from .comparison import Comparison, held_out_states
from .ledger import Ledger, ledger_of
from .results import plain, primary_name
from .study_file import MOST_SETS, Study

ScoreFiles = Callable[[Path, Path], dict[str, float]]
_SHOWN = 16  # samples in the report's pictures
_TIMED_ITERATIONS = 60  # of the trial run that tells how many iterations some seconds are


@dataclass(frozen=True)
class Prepared:
    """Where what a run trains on lies, and the seconds that making it took."""

    path: Path
    seconds: float


class Shared:
    """What the cells of a study share while they run beside each other.

    Args:
        study: the study.
        out: where all of it is written.
        root: the project's folder.
        score: gives the scores of an npz of samples by name, from the reference's npz and it.

    Attributes:
        commands: what runs the project's commands.
        iterations: what budgets in seconds have bought.
    """

    def __init__(self, study: Study, out: Path, root: Path, score: ScoreFiles):
        self.study, self.out, self.score = study, out, score
        self.commands = Commands(root)
        self.iterations = Steps(out / "iterations.json")
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def once(self, name: str) -> threading.Lock:
        """The lock of something that is made once."""
        with self._lock:
            return self._locks[name]

    @property
    def computing(self) -> threading.Lock:
        """Held by whoever computes in this process: one at a time, as torch's random numbers are common."""
        return self.once("computing")


class CellRun:
    """Runs one cell; what an earlier process has done of it is not done again."""

    def __init__(self, shared: Shared, cell: Cell):
        self.shared, self.cell, self.study = shared, cell, shared.study
        # A renamed run keeps its folder.
        known = sorted((shared.out / "cells").glob(f"*-{cell.id[:8]}"))
        own = shared.out / "cells" / f"{cell.name.replace('/', ',')}-{cell.id[:8]}"
        self.folder = known[0] if known else own
        self.steps = Steps(self.folder / "steps.json")
        self.experiment = self.study.experiment(cell.run, f"run.seed={cell.seed}")
        self.teacher = model_path(self.study, self.experiment.teacher.model_path, "teacher.")
        self.reference = reference_path(self.study)

    def run(self) -> dict[str, Any]:
        """Run it; its iterations, seconds and operations, its scores, or why it "failed"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"scores": []}
        seconds = 0.0
        if self.cell.run.teacher:
            record |= {"iterations": 0, "flops": Ledger().of(0)}
            record["scores"].append(self._scores(0, self.teacher))
        else:
            prepared = self._prepared()
            with self.shared.computing:
                ledger = ledger_of(self.experiment, self.cell.run.data, self._images())
            seconds = prepared.seconds
            record |= {"iterations": 0, "flops": ledger.of(0)}  # of one whose trial run diverges
            try:
                iterations = self._iterations(ledger, prepared)
                record |= {"iterations": iterations, "flops": ledger.of(iterations)}
                self._train(iterations, prepared)
            except CommandFailed as error:
                if DIVERGED not in str(error):
                    raise
                record["failed"] = str(error)
            else:
                for step in self.study.points(iterations):
                    scores = self._scores(step, self._weights_after(step))
                    record["scores"].append({"fraction": step / iterations} | scores)
        record["seconds"] = {"preparation": seconds}
        record["seconds"] |= {name: self.steps.seconds(name) for name in ("train", "sample", "score")}
        if self.study.keep == "little":
            self._tidy(record["iterations"])
        return record

    def can_extend(self, record: Mapping[str, Any]) -> bool:
        """Whether a record lacks distances to the teacher's samples that weights here would tell."""
        return not self.cell.run.teacher and any(self._extensible(scores) for scores in record["scores"])

    def _extensible(self, scores: Mapping[str, Any]) -> bool:
        """Whether the weights that are here are those that had these scores, which lack the distance."""
        here = self.steps.done.get(f"scores {scores['step']}", {})
        same = "primary" in here and plain(here["primary"]) == scores["primary"]
        return "to_teacher" not in scores and same and self._weights_after(scores["step"]).is_file()

    def extended(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record with these distances, which the study did not ask for when it was made."""
        extended = copy.deepcopy(dict(record))
        self._require_config(record["iterations"])
        for scores in filter(self._extensible, extended["scores"]):
            step = scores["step"]
            for number, own in enumerate(scores["sets"]):
                images = self._samples(step, self._weights_after(step), number)
                own["to_teacher"] = self._to_teacher(images, number)
            scores["to_teacher"] = fmean(own["to_teacher"] for own in scores["sets"])
        if self.study.keep == "little":
            self._tidy(record["iterations"])
        return extended

    def _command(self, script: str, *arguments: object) -> None:
        self.shared.commands.run(self.folder / "commands.log", script, *arguments)

    # What a run trains on

    def _prepared(self) -> Prepared:
        """What the run trains on; an empty path once it is trained."""
        if "trained" in self.steps.done:
            return Prepared(Path(), self.steps.done["trained"])
        return self._data() if self.cell.run.data else self._pool()

    def _pool(self) -> Prepared:
        """The pool of this seed and configuration, prepared once for all cells that share it."""
        experiment, training = self.experiment, self.experiment.student.training
        if experiment.teacher.iter_choice == "iterative_distillation":
            return Prepared(self.folder / "none.cache", 0.0)
        total = build_process(experiment.teacher, "teacher.timestep_respacing").num_timesteps
        teacher = experiment.teacher
        size = pool_size(teacher.iter_choice, teacher.BATCH, total, training.batch_size)
        identity = pool_identity(experiment, self.teacher, size)
        identity |= {"rows": teacher.batch_size, "dtype": experiment.distill.pool_dtype}
        identity |= self._teacher_precision
        folder = self.shared.out / "pools" / _key(identity)
        tempfile = folder / "pool.cache"
        with self.shared.once(str(folder)):
            steps = Steps(folder / "steps.json")
            if "prepared" not in steps.done:
                folder.mkdir(parents=True, exist_ok=True)
                steps.add("seed", self.cell.seed if experiment.distill.pool_seed == -1 else -1)
                config = self._config(folder / "pool.yaml", tempfile)
                with steps.timed("prepare"):
                    self._command("scripts/dynamic_prepare.py", "--config", config)
                steps.add("prepared")
            return Prepared(tempfile, steps.seconds("prepare"))

    def _data(self) -> Prepared:
        """The images of this seed and recipe, made once for all cells that share them."""
        data, cell = self.cell.run.data, self.cell
        assert data is not None
        if data.real == 1:
            return Prepared(self.reference, 0.0)
        content = self._teacher_identity | {"seed": cell.seed}
        content |= {"real": data.real, "respacing": data.respacing, "reference": sha256_of(self.reference)}
        folder = self.shared.out / "data" / _key(content)
        mixed = folder / "mixed.npz"
        with self.shared.once(str(folder)):
            steps = Steps(folder / "steps.json")
            if "mixed" not in steps.done:
                images = self._images()
                count = images - round(data.real * images)
                folder.mkdir(parents=True, exist_ok=True)
                steps.add("seed", cell.seed)
                config = folder / "teacher.yaml"
                with steps.timed("prepare"):
                    seed = _noise_seed(cell.seed, MOST_SETS)  # not that of a set of samples that are scored
                    self._sample_teacher(config, count, data.respacing, folder / "teacher", seed)
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

    def _iterations(self, ledger: Ledger, data: Prepared) -> int:
        """What the budget buys, a multiple of the study's divisor; the same for all seeds."""
        budget = self.cell.budget
        if budget.kind == "iterations":
            return int(budget.amount)
        if budget.kind == "flops":
            return self._whole(budget.amount - ledger.preparation, ledger.iteration)
        name = f"{self.cell.digest} {budget.amount:g} seconds"
        with self.shared.once(name):
            if (known := self.shared.iterations.done.get(name)) is not None:
                return known
            iterations = self._whole(budget.amount - data.seconds, self._seconds_per_iteration(data))
            with self.shared.once("iterations.json"):
                self.shared.iterations.add(name, iterations)
            return iterations

    def _whole(self, left: float, unit: float) -> int:
        """How many iterations of a unit's cost are left, rounded down to a multiple of the study's divisor.

        Raises:
            UserError: fewer are left than the divisor.
        """
        divisor = self.study.divisor
        count = int(left / unit) // divisor * divisor
        if count < divisor:
            raise UserError(
                f"budgets.{self.cell.budget.name}: does not pay for {divisor} iterations of "
                f"{self.cell.run.name} after its preparation; give a larger one"
            )
        return count

    def _seconds_per_iteration(self, data: Prepared) -> float:
        """Measured by a short run, the first sixth of which is not counted."""
        folder = self.folder / "trial"
        config = self._config(self.folder / "trial.yaml", data.path, _TIMED_ITERATIONS, log_interval=10)
        self._run_training(config, data, folder)
        rows = read_progress(folder / "progress.csv")
        shutil.rmtree(folder)
        first, last = rows[0], rows[-1]
        return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])

    def _train(self, iterations: int, data: Prepared) -> None:
        if "trained" in self.steps.done:
            self._require_config(iterations)
            return
        config = self._config(self._own_config, data.path, iterations)
        with self.steps.timed("train"):
            self._run_training(config, data, self.folder / "run")
        self.steps.add("trained", data.seconds)

    def _run_training(self, config: Path, data: Prepared, folder: Path) -> None:
        """The command that trains."""
        if self.cell.run.data is None:
            self._command("scripts/image_kd.py", "--config", config, "--exp_dir", folder)
        else:
            where = ["--data_dir", data.path, "--exp_dir", folder]
            self._command("scripts/image_train.py", "--config", config, *where)

    @property
    def _own_config(self) -> Path:
        return self.folder / f"{self.cell.run.name}.yaml"

    def _require_config(self, iterations: int) -> None:
        """Write what this cell's networks are sampled by, if the run had another name when it was trained."""
        if not self._own_config.is_file():
            self._config(self._own_config, Path(), iterations)

    def _config(self, path: Path, tempfile: Path, iterations: int = 0, log_interval: int = 0) -> Path:
        """Write the configuration of a command, resolved, with everything that the study decides in it."""
        experiment, data = copy.deepcopy(self.experiment), self.cell.run.data
        training, run = experiment.student.training, experiment.run
        experiment.teacher.model_path, experiment.teacher.tempfile = str(self.teacher), str(tempfile)
        if training.model_path:
            training.model_path = str(model_path(self.study, training.model_path, "student."))
        training.log_interval = log_interval or training.log_interval
        if iterations:
            training.lr_anneal_steps = iterations if training.lr_anneal_steps else 0
            training.save_interval = max(1, iterations // self.study.divisor)  # a trial run may be shorter
            run.weights_format = "pt"
            run.iterations, run.sample_interval, run.keep_last, run.eval_interval = iterations, -1, 0, 0
        if data is not None:
            training.random_flip = data.random_flip
        text = flat(experiment.student) | {"run": flat(run)} if data else experiment_keys(experiment)
        write_text(path, mapping_text(text))
        return path

    # Scores

    def _scores(self, step: int, weights: Path) -> dict[str, Any]:
        """All scores of some weights, those after so many iterations."""
        name = f"scores {step}"
        if name in self.steps.done:
            return self.steps.done[name]
        found: dict[str, Any] = {"step": step, "sets": []}
        compared = self.study.metrics.to_teacher and not self.cell.run.teacher
        for number in range(self.study.metrics.sets):
            images = self._samples(step, weights, number)
            with self.shared.computing, self.steps.timed(f"score {step}"):
                self.shared.commands.check()
                scores = self.shared.score(self.reference, images)
            if compared:
                scores["to_teacher"] = self._to_teacher(images, number)
            found["sets"].append(scores)
        found |= {key: fmean(one[key] for one in found["sets"]) for key in found["sets"][0]}
        found["primary"] = found[primary_name(found)]
        if not self.cell.run.teacher:
            with self.shared.computing, self.steps.timed(f"score {step}"):
                found |= self._compared(weights)
        self.steps.add(name, found)
        return found

    def _samples(self, step: int, weights: Path, number: int) -> Path:
        """A set of samples; the first ones of the first set are kept as a picture."""
        metrics, folder = self.study.metrics, self.folder / f"samples-{step}-{number}"
        seed = _noise_seed(self.cell.seed, number)
        config = self._own_config
        wanted = (metrics.samples, metrics.respacing, folder, seed)
        with self.steps.timed(f"sample {step}"):
            if self.cell.run.teacher:
                self._sample_teacher(config, *wanted)
            else:
                self._sample(config, weights, *wanted)
        images = next(folder.glob("samples_*.npz"))
        if not number:
            shown = NpzFile(images).load("arr_0")[:_SHOWN]
            scale = max(1, 32 // shown.shape[1])
            save_grid(self.folder / "pictures.png", shown, columns=_SHOWN, scale=scale)
        return images

    def _to_teacher(self, images: Path, number: int) -> float:
        """The score of a set of samples against what the teacher makes of the same noise."""
        theirs = self._teachers_samples(number)
        with self.shared.computing:
            self.shared.commands.check()
            scores = self.shared.score(theirs, images)
            return scores[primary_name(scores)]

    def _teachers_samples(self, number: int) -> Path:
        """What the teacher makes of the noise of a set of samples, made once for all cells of the seed."""
        metrics, seed = self.study.metrics, _noise_seed(self.cell.seed, number)
        content = self._teacher_identity | {"seed": seed}
        content |= {"count": metrics.samples, "respacing": metrics.respacing}
        folder = self.shared.out / "teacher" / _key(content)
        with self.shared.once(str(folder)):
            steps = Steps(folder / "steps.json")
            if "sampled" not in steps.done:
                folder.mkdir(parents=True, exist_ok=True)
                steps.add("seed", self.cell.seed)
                config = folder / "teacher.yaml"
                self._sample_teacher(config, metrics.samples, metrics.respacing, folder, seed)
                steps.add("sampled", next(folder.glob("samples_*.npz")).name)
        return folder / steps.done["sampled"]  # beside which its statistics will lie

    def _sample(
        self, config: Path, weights: Path, count: int, respacing: str, folder: Path, seed: int, *more: object
    ) -> None:
        self._command(
            *("scripts/image_sample.py", "--config", config, "--model_path", weights),
            *("--num_samples", count, "--batch_size", self.study.metrics.batch_size),
            *("--timestep_respacing", respacing, "--log_dir", folder, f"run.seed={seed}", *more),
        )

    def _sample_teacher(self, config: Path, count: int, respacing: str, folder: Path, seed: int) -> None:
        """Sample from the teacher as it is distilled; its configuration is written to `config`."""
        teacher = self.experiment.teacher
        write_text(config, mapping_text(teacher.network_keys() | {"run": flat(self.experiment.run)}))
        guidance = ["--guidance_scale", teacher.guidance_scale] if teacher.guidance_scale else []
        self._sample(config, self.teacher, count, respacing, folder, seed, *guidance)

    @property
    def _teacher_identity(self) -> dict[str, Any]:
        """What decides what the teacher predicts."""
        teacher = self.experiment.teacher
        settings = flat(teacher.architecture) | flat(teacher.process)
        found: dict[str, Any] = {"teacher": weights_sha256(self.teacher), "settings": settings}
        found |= build_space(teacher).identity()
        if teacher.guidance_scale:
            found["guidance_scale"] = teacher.guidance_scale
        return found | self._teacher_precision

    @property
    def _teacher_precision(self) -> dict[str, str]:
        """What decides the teacher's arithmetic, unless that is float32 by default."""
        precision = self.experiment.run.precision
        by_default = precision == "auto" and not self.experiment.teacher.architecture.use_fp16
        return {} if by_default else {"precision": precision}

    def _weights_after(self, step: int) -> Path:
        """What of a checkpoint is scored."""
        return self.folder / "run" / file_name(self.experiment.student.training.scored_weights, step)

    def _compared(self, weights: Path) -> dict[str, Any]:
        """What `Comparison` finds, as far as the study asks for it."""
        metrics, check = self.study.metrics, self.shared.commands.check
        found: dict[str, Any] = {}
        comparison = Comparison(self.experiment, self.teacher, weights)
        if metrics.held_out:
            content = self._teacher_identity | {"count": metrics.held_out}
            cache = self.shared.out / "states" / f"{_key(content)}.safetensors"
            states = held_out_states(self.experiment, self.teacher, metrics.held_out, cache, check)
            found["held_out"] = comparison.held_out(states)
        if metrics.chains:
            chain = comparison.own_chain(metrics.chains, metrics.respacing, check)
            found |= {"on_policy": chain["eps"], "path_kl": chain["path_kl"], "step_kl": chain["step_kl"]}
        del comparison
        dist_util.free_device_memory()  # for the commands that train and sample
        return found

    def _tidy(self, iterations: int) -> None:
        """Remove what is large, but the last averaged weights."""
        for path in (self.folder / "run").glob("*"):
            large = path.suffix in (".pt", ".cache") or manifest_step(path.name) is not None
            if large and path != self._weights_after(iterations):
                path.unlink()
        for folder in self.folder.glob("samples-*"):
            shutil.rmtree(folder)


def _noise_seed(seed: int, number: int) -> int:
    """The seed of a set of samples, 0 to `MOST_SETS`; no two of a study are equal."""
    return 1000 + (MOST_SETS + 1) * seed + number


def _key(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
