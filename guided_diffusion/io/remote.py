"""Files at URLs: gs://BUCKET/... and az://ACCOUNT/CONTAINER/... The only user of blobfile.

It is imported when a URL is used, and not before.
"""

import functools
import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import atomic_path, digest_of

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # with one slash too: a slip, not a folder "gs:"
_AZURE = re.compile(r"https://([^/.]+)\.blob\.core\.windows\.net/")
# No path, and nothing hidden: what is called otherwise is not ours, and is not written here.
_NAME = re.compile(r"\w[\w.+-]*", re.ASCII)
# A request is tried so often, with pauses of 6 seconds together; one that gets no answer at all is given
# up after 5 minutes. blobfile by itself tries for ever.
_RETRIES = 8
_CONNECT_SEC, _READ_SEC = 15, 30  # the first also bounds the sending of one chunk
_CHUNK = 4 << 20
logger = logging.getLogger(__name__)


class RemoteError(UserError):
    """A URL that cannot be read or written: its fault, the network's, or the store's."""


def is_url(name: str | Path) -> bool:
    """Whether a name is a URL, of whatever kind, and not a path."""
    return bool(_URL.match(str(name)))


def local_path(name: str) -> Path:
    """A path given on the command line.

    Raises:
        UserError: it is a URL, which as a path would name a folder called "gs:".
    """
    if is_url(name):
        raise UserError(f"{name}: a URL cannot be used here, only a local path")
    return Path(os.path.expanduser(name))


def normalised(url: str) -> str:
    """One spelling of a URL.

    Raises:
        UserError: it names no place in a store that is known.
    """
    url = _AZURE.sub(r"az://\1/", url).rstrip("/")
    if not re.match(r"gs://[^/]+|az://[^/]+/[^/]+", url):
        raise UserError(
            f"{url}: not understood; known are gs://BUCKET/PATH, az://ACCOUNT/CONTAINER/PATH and "
            "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"
        )
    return url


def local_name(url: str) -> str:
    """A folder's name that belongs to one URL and shows which."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", url)[-60:].strip("-.")
    return f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class RemoteFile:
    """What the store says of a file; `md5` is hexadecimal, and not always known."""

    size: int
    version: str
    md5: str | None


class Folder:
    """The files directly under a URL.

    Every method raises `RemoteError`, of one line, if the store cannot be reached or refuses.

    Args:
        url: with or without a slash at its end.

    Raises:
        UserError: no URL that is known, or blobfile is not installed.
    """

    def __init__(self, url: str):
        self.url = normalised(url)
        self._store = _store()

    def files(self) -> dict[str, RemoteFile]:
        """By name; empty if there is no such folder."""
        found = {}
        for entry in self._do("scandir", self.url, default=()):
            if entry.is_file and _NAME.fullmatch(entry.name):
                stat = entry.stat
                found[entry.name] = RemoteFile(stat.size, str(stat.version), stat.md5)
        return found

    def file(self, name: str) -> RemoteFile | None:
        """One file; None if it is not there."""
        stat = self._do("stat", self._path(name), default=None)
        return stat and RemoteFile(stat.size, str(stat.version), stat.md5)

    def read(self, name: str) -> bytes:
        """The contents of a small file."""
        return self._do("read_bytes", self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        self._do("write_bytes", self._path(name), content)

    def download(self, name: str, file: RemoteFile, path: Path) -> None:
        """Copy a file here; `path` appears once its contents agree with what the store says of them."""
        with atomic_path(path) as temporary:
            self._do("copy", self._path(name), str(temporary.absolute()))
            if temporary.stat().st_size != file.size or file.md5 not in (
                None,
                digest_of(temporary, hashlib.md5(usedforsecurity=False)),
            ):
                raise RemoteError(f"{self._path(name)}: arrived damaged, or changed meanwhile")

    def upload(self, path: Path) -> None:
        """Copy a file there, under its own name; it appears whole or not at all."""
        self._do("copy", str(path.absolute()), self._path(path.name), overwrite=True)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._do("remove", self._path(name), default=None)

    def require_writable(self) -> None:
        """Raise `RemoteError` unless files can be written and removed here."""
        self.write(".writable", b"")
        self.remove(".writable")

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _do(self, action: str, *arguments: str | bytes, default: Any = ..., **options: Any) -> Any:
        """One of blobfile's functions; `default` is what a missing file or folder gives instead."""
        try:
            answer = getattr(self._store, action)(*arguments, **options)
            return list(answer) if action == "scandir" else answer
        except FileNotFoundError as error:
            if default is not ...:
                return default
            raise RemoteError(str(error)) from error
        except Exception as error:  # whatever a store, the network or blobfile may answer with
            reason = getattr(error, "message", str(error)).strip() or type(error).__name__
            url = next(name for name in arguments if str(name).startswith(self.url))
            raise RemoteError(f"{url!s}: {reason.splitlines()[0]}") from error


def fetch(url: str, cache: Path) -> Path:
    """A file at a URL, copied to a cache unless this version of it is there.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    parent, _, name = normalised(url).rpartition("/")
    folder = Folder(parent)
    if (file := folder.file(name)) is None:
        raise RemoteError(f"{url}: no such file")
    return fetch_together(folder, {name: file}, cache) / name


def fetch_together(folder: Folder, files: dict[str, RemoteFile], cache: Path) -> Path:
    """The folder, in a cache, that holds these versions of some files."""
    key = hashlib.sha256(repr((folder.url, sorted(files.items(), key=str))).encode()).hexdigest()[:16]
    for name, file in files.items():
        if not (cache / key / name).is_file():
            folder.download(name, file, cache / key / name)
    return cache / key


@functools.cache
def _store() -> Any:
    """blobfile, with its patience limited."""
    try:
        import blobfile
    except ImportError:
        raise UserError("URLs need the package blobfile: pip install blobfile") from None
    return blobfile.create_context(
        retry_limit=_RETRIES,
        connect_timeout=_CONNECT_SEC,
        read_timeout=_READ_SEC,
        google_write_chunk_size=_CHUNK,
        azure_write_chunk_size=_CHUNK,
        log_callback=logger.debug,  # of every retry; what fails in the end is told
        save_access_token_to_disk=False,
    )
