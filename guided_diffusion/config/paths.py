"""Where what a configuration or a flag names lies, and where what is written lies. Imports no torch."""

import os
from pathlib import Path

from ..errors import UserError
from ..io.remote import is_url, local_path, normalised
from ..io.shipped import SHIPPED
from .foreign import find_folder
from .known_models import download_hint
from .loading import input_folders, project_root


def input_file(name: str, config: Path, what: str) -> str:
    """The model a key or flag names: in one of `loading.input_folders`, in the library
    (`model/digits_teacher.pt`), or on the Hub.

    Returns:
        The path of an existing file or folder, or a URL, which `dist_util.local_copy` fetches.

    Raises:
        UserError: no name, no such file, or no URL that is known.
    """
    if not name:
        raise UserError(f"{config}: {what} is not set")
    if is_url(name):
        return normalised(name)
    name, folders = os.path.expanduser(name), input_folders(config)
    for folder in (*folders, SHIPPED):
        if (path := folder / name).is_file():
            return name if folder == Path.cwd() else str(path)
    if found := find_folder(name, folders):
        return str(found)
    places = "" if Path(name).is_absolute() else f" in {', '.join(map(str, folders))}"
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
