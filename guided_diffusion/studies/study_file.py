"""What a study file says, checked before anything is run. Imports no torch."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from ..config.loading import load_distillation, read_mapping
from ..config.paths import resolve_path
from ..config.settings import DistillationExperiment, dotted
from ..errors import UserError, suggestion
from ..io.remote import is_url

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*", re.ASCII)
BUDGET_KINDS = ("iterations", "flops", "seconds")
MOST_SEEDS = 20  # the exact test looks at all 2^n signs
MOST_SETS = 99  # of samples, each of a seed of its own


@dataclass(frozen=True)
class Budget:
    """What each run of a comparison may spend.

    Attributes:
        name: in tables.
        kind: "iterations"; or "flops" or "seconds" of preparation and training together.
        amount: how many.
        seeds: the most of a run's seeds, its first ones, that get it.
    """

    name: str
    kind: str
    amount: float
    seeds: int = MOST_SEEDS


@dataclass(frozen=True)
class Metrics:
    """What is measured at every score point.

    Attributes:
        samples: images in a set.
        sets: sets, each with noise of its own; scores are their means.
        respacing: steps of the sampler, as `image_sample.py --timestep_respacing`.
        batch_size: images at a time while sampling.
        held_out: states of the teacher's full chain on which student and teacher are compared.
        chains: chains of the student's own along which they are compared.
        to_teacher: also the distance from what the teacher makes of the same noise.
    """

    samples: int = 1000
    sets: int = 2
    respacing: str = "50"
    batch_size: int = 125
    held_out: int = 256
    chains: int = 64
    to_teacher: bool = False


@dataclass(frozen=True)
class Data:
    """Images to train on instead of distilling (`image_train.py`).

    Attributes:
        real: share of real images, 0 to 1; the others are sampled by the teacher, so many that all are as
            many as the reference's.
        respacing: steps of the teacher's sampler.
        random_flip: mirror each image with probability 1/2.
    """

    real: float = 1.0
    respacing: str = "50"
    random_flip: bool = True


@dataclass(frozen=True)
class StudyRun:
    """One row of the study.

    Attributes:
        about: one line for the report.
        group: the table it stands in, beside the baseline.
        overrides: "key=value", later ones winning: those of all runs, those of its presets, its own.
        seeds: of everything random in it; the file may say how many, from 0.
        budgets: names of the budgets it is run with.
        data: train on images instead of distilling.
        teacher: no run at all, but the teacher itself, to compare with.
    """

    name: str
    about: str = ""
    group: str = ""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[str, ...] = ()
    data: Data | None = None
    teacher: bool = False


@dataclass(frozen=True)
class Question:
    """Two runs that the report compares, whatever tables they stand in.

    Attributes:
        ask: the question, for the report: "do larger batches help?".
        run, against: names of the runs; a difference is the first minus the second.
        budgets: names; without any, all that both runs have.
    """

    ask: str = ""
    run: str = ""
    against: str = ""
    budgets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A whole study file; docs/studies.md describes the keys."""

    path: Path
    config: Path
    runs: Mapping[str, StudyRun]
    budgets: Mapping[str, Budget]
    baseline: str
    baselines: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    about: str = ""
    findings: str = ""
    questions: tuple[Question, ...] = ()
    reference: str = "digits"
    backend: str = "digits"
    score_at: tuple[float, ...] = (1.0,)
    metrics: Metrics = field(default_factory=Metrics)
    keep: str = "little"
    results: str = ""
    report: str = ""

    @property
    def name(self) -> str:
        """The file's."""
        return self.path.stem

    @property
    def divisor(self) -> int:
        """What a number of iterations must be a multiple of, so that each score point is a whole one."""
        return math.lcm(*(Fraction(at).limit_denominator(1000).denominator for at in self.score_at))

    @property
    def image_size(self) -> int:
        """Of the images that the networks' samples are, or decode to, in pixels."""
        from ..script_util import build_space

        return build_space(self.experiment(self.runs[self.baseline]).student).image_size

    def seeds(self, run: StudyRun, budget: str) -> tuple[int, ...]:
        """Those that a run has with a budget, by its name."""
        return run.seeds[: self.budgets[budget].seeds] if budget in run.budgets else ()

    def points(self, iterations: int) -> list[int]:
        """The iterations after which to score, ascending, for a multiple of `divisor`."""
        return [int(Fraction(at).limit_denominator(1000) * iterations) for at in self.score_at]

    def experiment(self, run: StudyRun, *more: str) -> DistillationExperiment:
        """A run's configuration, with further overrides.

        Raises:
            UserError: it has a mistake.
        """
        try:
            return load_distillation(self.config, [*run.overrides, *more])
        except UserError as error:
            raise UserError(f"{self.path}: runs.{run.name}: {error}") from None


def load_study(path: Path) -> Study:
    """Read and check a study file, and the configuration of each of its runs.

    Raises:
        UserError: a mistake in one of them, in one line.
    """
    path = path.resolve()
    content = read_mapping(path)
    plain = {f.name for f in dataclasses.fields(Study)} - {"path"}
    _require_known(content, {*plain, "seeds"}, path, "")
    for name in ("config", "runs", "budgets", "baseline"):
        if not content.get(name):
            raise UserError(f"{path}: '{name}' is missing")
    budgets = {
        name: _budget(name, value, path) for name, value in _named(content["budgets"], path, "budgets")
    }
    defaults = {"seeds": content.pop("seeds", 3), "budgets": [next(iter(budgets))]}
    overrides = _overrides(content.pop("overrides", None), path, "overrides")
    content["runs"] = {
        name: _run(name, defaults | dict(value or {}), overrides, budgets, path)
        for name, value in _named(content["runs"], path, "runs")
    }
    content |= {
        "path": path,
        "overrides": overrides,
        "budgets": budgets,
        "config": resolve_path(str(content["config"]), path),
        "questions": _questions(content.get("questions", []), content["runs"], budgets, path),
        "metrics": _build(Metrics, content.get("metrics", {}), path, "metrics."),
        "score_at": _score_at(content.get("score_at", [1.0]), path),
    }
    study = _build(Study, content, path, "")
    _check(study)
    return study


def _check(study: Study) -> None:
    """Refuse what cannot be right in several keys together."""
    if not isinstance(study.baseline, str) or study.baseline not in study.runs:
        raise _unknown(study.path, "baseline", study.baseline, study.runs)
    if not isinstance(study.baselines, dict):
        raise UserError(f"{study.path}: baselines must hold groups and runs, not {study.baselines!r}")
    groups = {run.group for run in study.runs.values()}
    for group, name in study.baselines.items():
        if group not in groups:
            raise _unknown(study.path, "baselines", group, groups)
        if str(name) not in study.runs:
            raise _unknown(study.path, "baselines", name, study.runs)
    if study.keep not in ("little", "all"):
        raise UserError(f"{study.path}: keep must be little or all, not '{study.keep}'")
    for name, value in vars(study.metrics).items():
        if name != "respacing" and value < (name in ("samples", "sets", "batch_size")):
            raise UserError(f"{study.path}: metrics.{name} must not be {value}")
    if study.metrics.sets > MOST_SETS:
        raise UserError(f"{study.path}: metrics.sets must be at most {MOST_SETS}, not {study.metrics.sets}")
    if len({0, *(points := study.points(study.divisor))}) <= len(points):
        raise UserError(f"{study.path}: score_at: 0, or one point twice, in thousandths of a budget")
    for key in ("results", "report"):
        if is_url(getattr(study, key)):
            raise UserError(f"{study.path}: {key} must be a file here, not {getattr(study, key)}")
    if study.report and not study.report.endswith(".md"):  # its pictures' folder has the rest of the name
        raise UserError(f"{study.path}: report must end in .md, not be '{study.report}'")
    for budget in study.budgets.values():
        if budget.kind == "iterations" and budget.amount % study.divisor:
            raise UserError(
                f"{study.path}: budgets.{budget.name}: {budget.amount:g} iterations are no multiple of "
                f"{study.divisor}, as score_at needs"
            )
    for run in study.runs.values():
        if study.experiment(run).student.training.resume_checkpoint:
            raise UserError(
                f"{study.path}: runs.{run.name}: student.resume_checkpoint cannot be used in a study; "
                "student.model_path begins with given weights"
            )


def _run(
    name: str, values: dict[str, Any], overrides: tuple[str, ...], budgets: Mapping[str, Budget], path: Path
) -> StudyRun:
    where = f"runs.{name}."
    presets = values.pop("presets", [])
    presets = [presets] if isinstance(presets, str) else presets
    if not isinstance(presets, list):
        raise UserError(f"{path}: {where}presets must name a file or list files, not {presets!r:.60}")
    for preset in presets:
        overrides += _overrides(read_mapping(resolve_path(str(preset), path)), path, f"{where}presets")
    values["overrides"] = overrides + _overrides(values.get("overrides"), path, f"{where}overrides")
    if values.get("data") is not None:
        values["data"] = _build(Data, values["data"], path, f"{where}data.")
        if not 0 <= values["data"].real <= 1:
            raise UserError(f"{path}: {where}data.real must lie in [0, 1], not {values['data'].real:g}")
    values |= {"name": name, "budgets": _budget_names(values["budgets"], budgets, path, f"{where}budgets")}
    values["seeds"] = _seeds(values["seeds"], path, f"{where}seeds")
    return _build(StudyRun, values, path, where)


def _questions(
    values: Any, runs: Mapping[str, StudyRun], budgets: Mapping[str, Budget], path: Path
) -> tuple[Question, ...]:
    if not isinstance(values, list):
        raise UserError(f"{path}: questions must be a list, not {values!r:.60}")
    questions = []
    for number, value in enumerate(values):
        where = f"questions.{number}."
        question = _build(Question, value, path, where)
        for key, name in (("run", question.run), ("against", question.against)):
            if name not in runs:
                raise _unknown(path, f"{where}{key}", name, runs)
        shared = [b for b in runs[question.run].budgets if b in runs[question.against].budgets]
        named = _budget_names(question.budgets or shared, budgets, path, f"{where}budgets")
        questions.append(dataclasses.replace(question, budgets=named))
    return tuple(questions)


def _budget_names(value: Any, budgets: Mapping[str, Budget], path: Path, where: str) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise UserError(f"{path}: {where} must be a list of names")
    for name in value:
        if name not in budgets:
            raise _unknown(path, where, name, budgets)
    return tuple(value)


def _seeds(value: Any, path: Path, where: str) -> tuple[int, ...]:
    seeds = [*range(value)] if isinstance(value, int) and value <= MOST_SEEDS else value
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not 0 < len(set(seeds)) == len(seeds) <= MOST_SEEDS:
        raise UserError(
            f"{path}: {where} must be a number, 1 to {MOST_SEEDS}, or as many seeds, not {value!r}"
        )
    return tuple(seeds)


def _budget(name: str, value: Any, path: Path) -> Budget:
    where = f"budgets.{name}"
    if isinstance(value, dict):
        _require_known(value, {*BUDGET_KINDS, "seeds"}, path, f"{where}.")
    kinds = [kind for kind in BUDGET_KINDS if isinstance(value, dict) and kind in value]
    if len(kinds) != 1:
        raise UserError(f"{path}: {where} must be one of {', '.join(f'{k}: N' for k in BUDGET_KINDS)}")
    (kind,) = kinds
    amount = value[kind]
    whole = kind != "iterations" or isinstance(amount, int)
    if (
        not isinstance(amount, int | float)
        or isinstance(amount, bool)
        or not whole
        or not 0 < amount < math.inf
    ):
        raise UserError(f"{path}: {where}.{kind} must be a positive number, not {amount!r}")
    seeds = value.get("seeds", MOST_SEEDS)
    if type(seeds) is not int or not 0 < seeds <= MOST_SEEDS:
        raise UserError(f"{path}: {where}.seeds must be a number, 1 to {MOST_SEEDS}, not {seeds!r}")
    return Budget(name, kind, amount, seeds)


def _score_at(value: Any, path: Path) -> tuple[float, ...]:
    points = value if isinstance(value, list) else [value]
    if not all(isinstance(at, int | float) and 0 < at <= 1 for at in points):
        raise UserError(f"{path}: score_at must be fractions of a budget in (0, 1], not {value!r}")
    return tuple(sorted({float(at) for at in points} | {1.0}))


def _overrides(value: Any, path: Path, where: str) -> tuple[str, ...]:
    """ "key=value" from a list of those, or from a mapping whose sections may be nested."""
    if value is None:
        return ()
    if isinstance(value, dict):
        return tuple(f"{key}={_text(v)}" for key, v in dotted(value).items())
    if not isinstance(value, list) or not all(isinstance(item, str) and "=" in item for item in value):
        raise UserError(f"{path}: {where} must be keys and values, or a list of 'key=value'")
    return tuple(value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _named(content: Any, path: Path, where: str) -> list[tuple[str, Any]]:
    """The entries of a mapping whose keys are names of folders too."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: '{where}' must hold names and what belongs to each")
    for name, value in content.items():
        if not _NAME.fullmatch(str(name)):
            raise UserError(f"{path}: {where}.{name}: a name is made of letters, digits and . + = - _")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: {where}.{name} must hold keys and values, not {value!r}")
    return [(str(name), value) for name, value in content.items()]


def _build(kind: type[_T], values: Any, path: Path, where: str) -> _T:
    """A dataclass of this module from a file's keys, whose types are compared with its defaults'."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: {where.rstrip('.')} must hold keys and values, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _require_known(values, set(fields), path, where)
    given = {}
    for name, value in values.items():
        default = fields[name].default
        wanted = type(default)
        if wanted is str and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # respacing: 50
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1e300 else math.inf
        if wanted in (str, int, float, bool) and type(value) is not wanted:
            raise UserError(f"{path}: {where}{name} must be {wanted.__name__}, not {value!r}")
        given[name] = value
    return kind(**given)


def _require_known(values: Mapping[str, Any], known: set[str], path: Path, where: str) -> None:
    for name in values:
        if name not in known:
            raise _unknown(path, "unknown key", f"{where}{name}", [f"{where}{k}" for k in sorted(known)])


def _unknown(path: Path, what: str, name: Any, known: Any) -> UserError:
    hint = suggestion(str(name), known)
    return UserError(
        f"{path}: {what} '{name}': {hint}" if " " in what else f"{path}: {what}: no '{name}'; {hint}"
    )
