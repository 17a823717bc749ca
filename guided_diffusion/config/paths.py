"""Where what a configuration or a flag names lies, and where what is written lies. Imports no torch."""

import os
from pathlib import Path

from ..errors import UserError
from ..io.remote import is_url, local_path, normalised
from .known_models import download_hint
from .loading import find_model, input_folders, project_root


def input_file(name: str, config: Path, what: str) -> str:
    """The model a key or flag names; see `loading.find_model`.

    Returns:
        The path of an existing file or folder, or a URL, which `dist_util.local_copy` fetches.

    Raises:
        UserError: no name, no such file, or no URL that is known.
    """
    if not name:
        raise UserError(f"{config}: {what} is not set")
    if is_url(name):
        return normalised(name)
    if found := find_model(name, config):
        return str(found)
    name = os.path.expanduser(name)
    places = f" in {', '.join(map(str, input_folders(config)))}" if not Path(name).is_absolute() else ""
    raise UserError(f"{what}: no such file: {name}{places}{download_hint(name)}")


def output_path(name: str | Path, config: Path) -> Path:
    """A path of a configuration that is written: relative ones lie in the configuration's project.

    Raises:
        UserError: it is a URL.
    """
    return project_root(config) / local_path(str(name))


def remote_path(config: Path) -> Path:
    """Where the local directories of URLs lie."""
    return output_path("experiments/remote", config)


def fetched_path(config: Path) -> Path:
    """Where the local copies of files at URLs lie."""
    return remote_path(config) / "files"
