"""Where results come from: written into checkpoints and samples, so that a wrong score can be traced."""

import subprocess
from pathlib import Path
from typing import Any

from ..config.loading import project_root
from ..config.settings import Denoiser, flat
from ..script_util import build_space


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
    }


def git_revision(folder: Path) -> str | None:
    """The commit checked out in a folder, "+changes" if files differ from it; None outside git."""
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
