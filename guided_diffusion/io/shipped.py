"""Where the configurations, models and scripts that come with the library lie."""

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2]  # the folder that holds guided_diffusion/ and evaluations/
IS_INSTALLED = (LIBRARY / "tccd" / "yaml").is_dir()  # by a wheel, and not used out of a checkout
SHIPPED = LIBRARY / "tccd" if IS_INSTALLED else LIBRARY  # holds yaml/, model/, scripts/ and datasets/


def user_cache() -> Path:
    """The user's folder for what can be had again: XDG_CACHE_HOME, if that is absolute, or ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return named if named.is_absolute() else Path.home() / ".cache"


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
