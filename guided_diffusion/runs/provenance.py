"""Where results come from: written into checkpoints and samples, so that a wrong score can be traced."""

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config.loading import experiment_of, project_root
from ..config.registry import ARCHITECTURES
from ..config.settings import Denoiser, Experiment, flat
from ..errors import UserError
from ..io.shipped import IS_INSTALLED
from ..script_util import build_space
from .checkpoint import read_description


def describe_network(name: str, denoiser: Denoiser, config: Path) -> dict[str, Any]:
    """What a checkpoint says of its network; see `checkpoint.read_description`.

    Args:
        name: of the configuration.
        denoiser: the network's architecture, process and space.
        config: the configuration's file.
    """
    return {
        "config": name,
        "revision": git_revision(project_root(config)),
        "architecture": flat(denoiser.architecture),
        "process": flat(denoiser.process),
        "space": build_space(denoiser).describe(),
        "space_keys": flat(denoiser.space),
    }


def described_experiment(weights: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The configuration that a checkpoint of ours carries: what `describe_network` wrote.

    Raises:
        UserError: it carries none, an override is mistaken, or it names an architecture that is not built
            in: a file does not choose what is imported.
    """
    description = read_description(weights)
    keys: dict[str, Any] = {}
    for part in ("architecture", "process", "space_keys"):
        if not isinstance(told := description.get(part, {}), dict):
            raise UserError(f"{weights}: what it says of itself is damaged ({part} is no mapping)")
        keys |= told
    if not keys:
        raise UserError(f"{weights}: does not say what network it is of; give its configuration by --config")
    if (name := keys.get("architecture")) not in tuple(ARCHITECTURES):  # importing another would run it
        raise UserError(
            f"{weights}: is of the architecture {name!r:.80}, which is not built in; if you trust that, "
            "give its configuration by --config"
        )
    experiment = experiment_of(keys, weights, overrides)
    experiment.name = str(description.get("config", "unnamed"))
    return experiment


def git_revision(folder: Path) -> str | None:
    """The commit checked out in a folder, "+changes" if files differ from it; None outside git.

    Where the library is installed, its version instead: the folder's commit is then of something else.
    """
    if IS_INSTALLED:
        return f"version {metadata.version('guided-diffusion-tccd')}"
    git = ["git", "-C", str(folder)]
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
