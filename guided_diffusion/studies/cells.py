"""The cells of a study (run x budget x seed), and ids by which other machines know them too.

Imports torch for latents alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..config import paths
from ..config.settings import SECTIONS, Denoiser, DistillationExperiment, flat
from ..errors import UserError
from ..io.digits import digits_file
from ..io.model_folder import weights_sha256
from ..io.remote import is_url
from .study_file import Budget, Study, StudyRun

# Keys that say where a run's files lie, how far it goes, or what it tells: not what it is.
_NOT_IDENTITY = {
    "teacher": {"model_path", "tempfile", "vae_path"},
    "student": {
        *("model_path", "vae_path"),
        *("lr_anneal_steps", "log_interval", "save_interval", "cache_save_interval", "resume_checkpoint"),
    },
    "distill": {"pool_device"},
    "run": {
        *("iterations", "seed", "keep_last", "keep_every"),
        *("sample_interval", "num_samples", "sample_respacing"),
        *("eval_interval", "eval_samples", "eval_backend", "eval_reference"),
    },
}
_NO_INFLUENCE = ("batch_size", "to_teacher")  # on what else is measured


@dataclass(frozen=True)
class Cell:
    """One run with one budget and one seed.

    Attributes:
        digest: of what is run and how it is scored, whatever the budget and the seed.
        id: of all of it. The same on every machine, whatever the run is called.
    """

    run: StudyRun
    budget: Budget
    seed: int
    digest: str
    id: str

    @property
    def name(self) -> str:
        """For people, and for `--only`."""
        return f"{self.run.name}/{self.budget.name}/{self.seed}"


def cells_of(study: Study) -> Iterator[Cell]:
    """All of them, seed by seed, so that every run has its first before any has its second.

    What two runs have in common comes twice, with the same id.

    Raises:
        UserError: the teacher or the reference is not there.
    """
    digests = {}
    sha256 = cache(weights_sha256)
    for name, run in study.runs.items():
        digests[name] = _digest(_identity(study, run, sha256))
    for seed in sorted({seed for run in study.runs.values() for seed in run.seeds}):
        for run in study.runs.values():
            for name in run.budgets:
                if seed not in study.seeds(run, name):
                    continue
                budget = study.budgets[name]
                spent = ["flops", 0.0] if run.teacher else [budget.kind, float(budget.amount)]
                own = {"run": digests[run.name], "budget": spent, "seed": seed}
                yield Cell(run, budget, seed, digests[run.name], _digest(own))


def model_path(study: Study, name: str, where: str) -> Path:
    """The checkpoint that a section's `model_path` names, a file or a diffusers folder.

    Raises:
        UserError: it is not there, or a URL.
    """
    name = paths.input_file(name, study.config, f"{where}model_path")
    if is_url(name):
        raise UserError(f"{study.path}: {where}model_path must be a file or folder here, not {name}")
    return Path(name).resolve()


def reference_path(study: Study) -> Path:
    """Where the real images lie; "digits", of the size of the networks, `datasets/digits.py` writes there.

    Raises:
        UserError: they are not there, or at a URL.
    """
    if study.reference == "digits":
        return paths.output_path(f"datasets/digits/{digits_file(study.image_size)}", study.path)
    name = paths.input_file(study.reference, study.path, "reference")
    if is_url(name):
        raise UserError(f"{study.path}: reference must be a file here, not {name}")
    return Path(name).resolve()


def changed_keys(experiment: DistillationExperiment) -> dict[str, dict[str, Any]]:
    """The keys, section by section, that are not at their defaults and are part of what a run is.

    Keys that a later version adds do not occur here as long as they are at their defaults.
    """
    changed = {}
    for name, without in _NOT_IDENTITY.items():
        section = getattr(experiment, name)
        own = {"architecture": type(section.architecture)()} if isinstance(section, Denoiser) else {}
        defaults = flat(type(section)(**own))
        changed[name] = {
            key: value
            for key, value in flat(section).items()
            if key not in without and value != defaults[key]
        }
    assert changed.keys() == SECTIONS.keys()
    return changed


def _identity(study: Study, run: StudyRun, sha256: Callable[[Path], str]) -> dict[str, Any]:
    experiment = study.experiment(run)
    reference = study.reference
    identity = {
        "settings": changed_keys(experiment),
        "annealed": experiment.student.training.lr_anneal_steps > 0,
        "teacher": sha256(model_path(study, experiment.teacher.model_path, "teacher.")),
        "data": asdict(run.data) if run.data else None,
        "reference": reference if reference == "digits" else sha256(reference_path(study)),
        "backend": study.backend,
        "metrics": {k: v for k, v in asdict(study.metrics).items() if k not in _NO_INFLUENCE},
        "score_at": list(study.score_at),
    }
    if experiment.student.training.model_path:
        identity["initial"] = sha256(model_path(study, experiment.student.training.model_path, "student."))
    if experiment.teacher.space.vae_path:
        from ..script_util import build_space

        identity["space"] = build_space(experiment.teacher).identity()
    return identity | ({"teacher_itself": True} if run.teacher else {})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
