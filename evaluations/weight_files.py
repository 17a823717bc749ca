"""Weight files that are downloaded once, whole, into the user's cache."""

import re
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import atomic_path, sha256_of
from guided_diffusion.io.progress import Progress
from guided_diffusion.io.shipped import user_cache

_TIMEOUT_SEC = 30


def cache_directory() -> Path:
    """Where downloads are kept: in the user's cache, in a folder of this project's."""
    return user_cache() / "guided-diffusion-tccd"


def download_once(url: str, check: Callable[[Path], object]) -> Path:
    """Path of a file that is fetched when it is not yet in the cache.

    Args:
        url: its address; the last part names the file.
        check: raises `UserError` when the file is not what it should be; nothing is kept then.

    Raises:
        UserError: it cannot be fetched (the message says where to put a copy), or the check failed.
    """
    target = cache_directory() / url.rsplit("/", 1)[1]
    if target.is_file():
        return target
    try:
        with atomic_path(target) as temporary:
            _fetch(url, temporary)
            check(temporary)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({error}); get it on another machine and put it at {target}, "
            "or name it to the evaluator with --inception PATH"
        ) from None
    return target


def _fetch(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SEC) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        expected = None if length is None else int(length)
        name = url.rsplit("/", 1)[1]
        with Progress(expected, name, "B") as progress:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.advance(len(chunk))
        if expected is not None and file.tell() != expected:
            raise OSError(f"the connection ended after {file.tell()} of {expected} bytes")


def check_hash_in_name(path: Path, name: str) -> None:
    """Verify a weight file whose name ends in -HASH.pth, the first digits of its SHA-256.

    Args:
        path: the file.
        name: the name that carries the hash; one without a hash is not checked.

    Raises:
        UserError: the contents have another hash.
    """
    claimed = re.search(r"-([0-9a-f]{8,64})\.pth$", name)
    if claimed and not sha256_of(path).startswith(claimed[1]):
        raise UserError(
            f"{name}: SHA-256 begins with {sha256_of(path)[:8]}, not {claimed[1]} as its name says; "
            "the file is damaged or not the published one"
        )
