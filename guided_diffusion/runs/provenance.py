"""Where results come from: written into checkpoints and samples, so that a wrong score can be traced."""

import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config.described import described_keys
from ..config.loading import experiment_of
from ..config.settings import Denoiser, DistillationExperiment, Experiment, flat
from ..errors import UserError
from ..io.description import read_description
from ..io.files import folder_name
from ..io.shipped import IS_INSTALLED, LIBRARY
from ..respace import SpacedDiffusion
from ..script_util import build_process, build_space
from .checkpoint import newest_checkpoint


def describe_training(experiment: Experiment) -> dict[str, Any]:
    """What a run's checkpoints say of themselves; see `io.description`."""
    return describe_network(experiment) | training_facts(experiment)


def describe_network(experiment: Experiment) -> dict[str, Any]:
    """The part of `describe_training` that says what network it is, and where this is told."""
    student = experiment.student
    return {
        "config": experiment.name,
        "revision": git_revision(),
        "architecture": flat(student.architecture),
        "process": flat(student.process),
        "space": build_space(student).describe(),
        "space_keys": flat(student.space),
    }


def training_facts(experiment: Experiment) -> dict[str, str]:
    """How a network is trained: "method"; of a distilled one "teacher", its file as it was configured, and
    "guidance" where that is guided.
    """
    if not isinstance(experiment, DistillationExperiment):
        return {"method": "trained from data"}
    distill = experiment.distill
    method = f"distilled by {distill.objective}"
    if distill.objective == "tccd":
        stages = distill.stage1_weight or distill.stage2_weight
        method = "distilled by TCCD" if stages else "distilled by DKDM (TCCD with both stages off)"
    method += ", without any data (from the teacher's own samples)"
    facts = {"method": method, "teacher": experiment.teacher.model_path}
    if scale := experiment.teacher.guidance_scale:
        facts["guidance"] = f"the teacher's, {scale:g}, is in the network's own predictions"
    return facts


def described_experiment(weights: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The configuration that a checkpoint of ours carries, what `describe_network` wrote; or that of a
    diffusers folder.

    Raises:
        UserError: it carries none or a damaged one, an override is mistaken, or it names an architecture that
            is not built in: a file does not choose what is imported.
    """
    if weights.is_dir():
        if newest := newest_checkpoint(weights):
            told = f"is a run's directory; name a checkpoint in it, such as {newest.path('model')}"
            raise UserError(f"{weights}: {told}")
        return experiment_of({"model_path": str(weights)}, weights, overrides)
    description = read_description(weights)
    keys = described_keys(description, weights)
    if not keys:
        raise UserError(f"{weights}: does not say what network it is of; its configuration does (--config)")
    experiment = experiment_of(keys, weights, overrides)
    experiment.name = folder_name(description.get("config"))
    return experiment


def require_known_steps(denoiser: Denoiser, process: SpacedDiffusion, description: Mapping[str, Any]) -> None:
    """Refuse steps that a network was not trained on, where its checkpoint says that it knows some only.

    Args:
        denoiser: its configuration.
        process: what it is to be sampled by.
        description: see `io.description`.

    Raises:
        UserError: the process visits steps that the network does not know.
    """
    if not (trained := str(description.get("process", {}).get("timestep_respacing", ""))):
        return
    known = build_process(denoiser, "the checkpoint's timestep_respacing", trained).timestep_map
    if not set(process.timestep_map) <= set(known):
        raise UserError(
            f"the network knows the {len(known)} steps of timestep_respacing {trained} alone: sample it in "
            "these, or some of them"
        )


def has_untrained_null_class(description: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says that its labels were never dropped, so that "no class" was never trained."""
    return description.get("architecture", {}).get("class_dropout_prob", None) == 0


def git_revision(folder: Path = LIBRARY) -> str | None:
    """The commit of the library, "+changes" if files differ from it; None outside git.

    Where the library is installed, its version instead.

    Args:
        folder: the checkout.
    """
    if IS_INSTALLED:
        return f"version {metadata.version('guided-diffusion-tccd')}"
    # Without core.fsmonitor, by which the folder's own settings could name a program to run.
    git = ["git", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
