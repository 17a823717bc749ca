"""Where what a configuration or a flag names lies, and where what is written lies. Imports no torch."""

import os
import re
from pathlib import Path

from ..errors import UserError
from ..io.model_folder import fetch_from_hub, is_hub_name
from ..io.remote import is_url, local_path, normalised
from ..io.shipped import IS_INSTALLED, SHIPPED
from .known_models import download_hint

_SHIPPED = (SHIPPED / "yaml", SHIPPED)  # "yaml/arch/NAME.yaml" is found, and "arch/NAME.yaml"


def find_config(name: str | os.PathLike) -> Path:
    """The configuration that a name means: this file, or else the one that comes with the library.

    Returns:
        Its path; of a baseline on mixed data, NAME-Baseline-RATIO.yaml, no file need be there. The name
        itself where there is no such configuration.
    """
    places = (folder / name for folder in (Path(), *_SHIPPED))  # an absolute name replaces the folder
    return next((path for path in places if existing_config(path).is_file()), Path(name))


def existing_config(path: Path) -> Path:
    """The file itself; for a baseline on mixed data, NAME-Baseline-RATIO.yaml, that of the baseline.

    The ratio is a matter of the data (`datasets/mix.py`), not of the configuration.
    """
    match = re.fullmatch(r"(.*-Baseline)-(0\.\d+|1(\.0)?)\.yaml", path.name)
    if path.is_file() or not match:
        return path
    return path.with_name(f"{match[1]}.yaml")


def resolve_path(name: str, beside: Path) -> Path:
    """The existing file that `name` means in the configuration file `beside`.

    Raises:
        UserError: there is none; the message says where it was looked for.
    """
    if (found := find_path(name, beside)) is not None:
        return found
    if os.path.isabs(name):
        raise UserError(f"{beside}: no such file: {name}")
    raise UserError(
        f"{beside}: '{name}' is to be found neither from its folder upwards nor from {Path.cwd()}, "
        f"nor does it come with the library ({SHIPPED / 'yaml'})"
    )


def find_path(name: str, beside: Path) -> Path | None:
    """Like `resolve_path`, but None when there is no such file."""
    for folder in (*beside.resolve().parents, Path.cwd(), *_SHIPPED):
        if (folder / name).is_file():  # an absolute name replaces the folder
            return folder / name
    return None


def input_folders(config: Path) -> list[Path]:
    """Where relative names of models and references that a configuration gives are looked for, in order."""
    return list(dict.fromkeys([Path.cwd(), project_root(config), config.resolve().parent]))


def find_model(name: str, config: Path) -> Path | None:
    """The file or folder that a configuration names as a model: in one of `input_folders`, in the library
    (`model/digits_teacher.pt`), or fetched from the Hub; None for a URL, and where there is none.

    Raises:
        UserError: it may be a name of the Hub's, but there is no such model there either.
    """
    if not name or is_url(name):
        return None
    name = os.path.expanduser(name)
    places = (Path(name), *(folder / name for folder in (*input_folders(config), SHIPPED)))
    found = next((place for place in places if place.is_file() or place.is_dir()), None)
    return fetch_from_hub(name) if found is None and is_hub_name(name) else found


def input_file(name: str, config: Path, what: str) -> str:
    """The model a key or flag names; see `find_model`.

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


def project_root(config: Path) -> Path:
    """The folder that relative output paths of a configuration are taken from.

    That is the folder holding the `yaml/` tree the configuration lies in, so that all commands agree
    whatever directory they are run from; the working directory for a configuration elsewhere, or one that is
    installed with the library.
    """
    for folder in config.resolve().parents:
        if folder.name == "yaml" and not (IS_INSTALLED and folder.parent == SHIPPED):
            return folder.parent
    return Path.cwd()


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
