"""Files that are never half-written."""

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UserError, first_line
from .json_text import parse_json
from .progress import say

_UMASK = os.umask(0o077)  # which cannot be read without being set
os.umask(_UMASK)
_THIS_PROCESS = secrets.token_hex(4)  # in containers that share a folder two may have the same number


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it into place.

    The final name appears only with complete contents; after an error nothing is left behind. Of a link the
    target is written.

    Raises:
        OSError: a folder or a device is there (root could replace even /dev/null), or writing fails.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is there, and is no file", str(path))
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        set_usual_mode(temporary)
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)
    except SafetensorError as error:  # its way of telling a full disk
        raise OSError(errno.EIO, first_line(error), str(path)) from None
    except OSError as error:
        error.filename = error.filename or str(path)  # which those of writing lack
        raise
    finally:
        temporary.unlink(missing_ok=True)


def set_usual_mode(path: Path) -> None:
    """Give a file the mode of every new one: safetensors keeps its own from everyone else."""
    with suppress(OSError):  # not every file system has modes
        path.chmod(0o666 & ~_UMASK)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_THIS_PROCESS}.tmp")


def read_object(path: str | os.PathLike, most_bytes: int = 1 << 20) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is larger than `most_bytes`, or holds something else; or OSError.
    """
    if os.stat(path).st_size > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    found = parse_json(Path(path).read_bytes())
    if not isinstance(found, dict):
        raise ValueError("must hold one JSON object")
    return found


def folder_name(name: object) -> str:
    """The name, where a folder can be called so; "unnamed" where not."""
    name = str(name)
    can_be = name == Path(name).name != ".." and name.isprintable() and len(name.encode()) <= 200
    return name if can_be else "unnamed"


def short_names(paths: Sequence[str]) -> list[str]:
    """As little of the end of each path as tells them apart."""
    parts = [Path(path).parts for path in paths]
    labels: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = [str(Path(*part[-depth:])) for part in parts]
        if len(set(labels)) == len(set(paths)):
            break
    return labels


# What file systems that do not lock answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_PATIENCE = 10.0  # seconds for the one who holds a lock to end


@contextmanager
def held(path: Path, *, patience: float | None = None) -> Iterator[None]:
    """Keep other processes from writing to a directory, or to one file, until the block ends.

    A POSIX record lock on a `.lock` inside the directory, or `.NAME.lock` beside the file: it ends
    with the process however that ends, is not inherited by forked workers, and holds over NFS. A file
    system without locks is trusted to have one writer.

    Args:
        path: an existing directory, or a file in one.
        patience: seconds that a process which holds it has to end; by default ten, since one that is being
            stopped takes some. Who waits longer is told.

    Raises:
        UserError: another process holds it; one line says which.
    """
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
    told_at = time.monotonic() + _PATIENCE
    while True:
        file = open(lock, "a+")  # noqa: SIM115 (closing it is what ends the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        except FileNotFoundError:  # its holder has just removed it
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                break
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise
            file.seek(0)
            who = f"another process is writing there ({file.read(100).strip() or 'unknown'})"
            if time.monotonic() >= deadline:
                file.close()
                raise UserError(f"{path}: {who}") from None
            if time.monotonic() >= told_at:
                say(f"{path}: waiting: {who}", sys.stderr)
                told_at = math.inf
            time.sleep(0.1)
        file.close()
    try:
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        file.close()


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Remove what killed processes left of their `atomic_path`s in a directory.

    Only where no other process is writing (`held`).

    Args:
        directory: where to look.
        name: only of files whose name begins like this.
    """
    pattern = re.compile(rf"\.{re.escape(name)}.*\.\d+(-[0-9a-f]+)?\.tmp")
    for path in directory.glob(".*.tmp"):
        if pattern.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's contents, as 64 hexadecimal digits."""
    return digest_of(path, hashlib.sha256())


def digest_of(path: str | os.PathLike, digest: Any) -> str:
    """A file's contents, read in chunks, by one of hashlib's objects; in hexadecimal digits."""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
