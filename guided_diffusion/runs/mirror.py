"""A run's directory at a URL: the run works in a local one, and the remote one is a copy of it.

The copy is brought here when a run starts, and up to date after each checkpoint and at the end. As on disk,
a checkpoint counts there only if its manifest's sizes and checksums agree, and the manifest is sent last.
"""

import re
import threading
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.files import sha256_of
from ..io.progress import warn
from ..io.remote import Folder, RemoteError, RemoteFile, fetch_together, local_name, normalised
from .best import BEST, best_checkpoint, read_best
from .checkpoint import (
    MANIFEST_BYTES,
    Checkpoint,
    Retention,
    complete_checkpoints,
    file_name,
    file_step,
    manifest_name,
    manifest_step,
    manifest_text,
    newest_checkpoint,
    open_checkpoint,
    parse_manifest,
    read_manifest,
)

_Listing = dict[str, RemoteFile]


class Mirror:
    """A local directory and its copy at a URL. For rank 0 alone.

    Args:
        url: of the copy.
        parent: the local directory lies in it, under a name that belongs to the URL.
        retention: which checkpoints stay there, as here; by default all.

    Raises:
        UserError: no URL that is known.
    """

    def __init__(self, url: str, parent: Path, retention: Retention | None = None):
        self.url = normalised(url)
        self.directory = parent / local_name(self.url)
        self.retention = retention or Retention()
        self._pushing = threading.Lock()
        self._sent: dict[int, dict[str, Any]] = {}  # the manifests that are known to be there
        self._damaged: set[int] = set()  # the steps whose copies are not what their manifests say
        self._records: dict[str, tuple[int, int]] = {}  # size and time of those that are there

    def require_writable(self) -> None:
        """Find a mistake in the URL now, and not when the first checkpoint is there.

        Raises:
            UserError: the URL cannot be written.
        """
        Folder(self.url).require_writable()

    def pull(self) -> Checkpoint | None:
        """Bring the newest checkpoint here, if it is newer than those here, and the records with it.

        Returns:
            The newest checkpoint, from either side.

        Raises:
            UserError: the URL cannot be read, or not be written.
        """
        self.require_writable()
        folder = Folder(self.url)
        there = folder.files()
        here = newest_checkpoint(self.directory)
        newest, self._damaged = newest_set(folder, there, self.directory, here)
        if newest is None or newest is not here:
            for name in filter(_is_record, there):
                folder.download(name, there[name], self.directory / name)
                self._records[name] = _stamp(self.directory / name)
            self._bring_best(folder, there)
        return newest

    def _bring_best(self, folder: Folder, there: _Listing) -> None:
        """Bring what best.json names here too, as it is among the checkpoints that are kept."""
        path = self.directory / BEST
        try:
            manifest = manifest_name(step := read_best(path)[0]) if path.is_file() else ""
            if manifest in there and not (self.directory / manifest).is_file():
                _bring(folder, step, there, self.directory)
        except (UserError, ValueError) as error:
            warn(f"ignoring the best checkpoint of {folder.url}: {error}")

    def push(self) -> None:
        """Bring the copy up to date: records, then the checkpoints that it lacks, the newest first.

        Raises:
            UserError: something could not be sent. What was sent before counts; calling again goes on.
        """
        with self._pushing:  # the writer of checkpoints may be at it when a run fails
            self._push()

    def _push(self) -> None:
        folder = Folder(self.url)
        there = folder.files()
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and _is_record(path.name) and path.name != BEST:
                self._push_record(folder, path)
        here = complete_checkpoints(self.directory)
        for checkpoint in reversed(here):
            self._push_set(folder, checkpoint, there)
        if (self.directory / BEST).is_file():  # only now is there what it names
            self._push_record(folder, self.directory / BEST)
        if here:
            self._prune(folder, here, there)

    def _push_record(self, folder: Folder, path: Path) -> None:
        stamp = _stamp(path)  # of before: what is written while it is sent is sent the next time
        if self._records.get(path.name) != stamp:
            folder.upload(path)
            self._records[path.name] = stamp

    def _push_set(self, folder: Folder, checkpoint: Checkpoint, there: _Listing) -> None:
        step, name = checkpoint.step, manifest_name(checkpoint.step)
        ours = read_manifest(self.directory, step)
        if name in there and self._sent.get(step) == ours:
            return
        theirs = {} if step in self._damaged else _their_manifest(folder, step, there)
        missing = [f for f in ours if theirs.get(f) != ours[f] or _size(there, f) != ours[f]["bytes"]]
        if missing:
            if name in there:
                folder.remove(name)  # a set that is being replaced does not count
            for f in missing:
                folder.upload(self.directory / f)
            sent = folder.files()
            if short := [f for f in ours if _size(sent, f) != ours[f]["bytes"]]:
                raise RemoteError(f"{folder.url}/{short[0]}: has not arrived whole")
        if missing or theirs != ours:
            folder.write(name, manifest_text(step, ours).encode())
        for f in theirs.keys() - ours.keys():
            folder.remove(f)
        self._sent[step] = ours
        self._damaged.discard(step)

    def _prune(self, folder: Folder, checkpoints: list[Checkpoint], there: _Listing) -> None:
        """Apply the retention to what is there and not here, such as what another machine has left.

        Sets that are newer than ours, which we could not use, are not counted.
        """
        here, best = [checkpoint.step for checkpoint in checkpoints], best_checkpoint(checkpoints)
        steps = sorted({*here, *(step for step in _steps(there) if step < here[-1])})
        superfluous = self.retention.superfluous(steps, best[0].step if best else None)
        for step in superfluous:
            if step not in here:
                folder.remove(manifest_name(step))
                for name in there:
                    if file_step(name) == step:
                        folder.remove(name)
        for step in set(self.retention.without_pool(steps)) - set(superfluous):
            if step not in here and (pool := file_name("pool", step)) in there:
                files = _their_manifest(folder, step, there)
                if files.pop(pool, None):
                    folder.write(manifest_name(step), manifest_text(step, files).encode())
                    folder.remove(pool)


def newest_set(
    folder: Folder, there: _Listing, directory: Path, here: Checkpoint | None = None
) -> tuple[Checkpoint | None, set[int]]:
    """Bring the newest good set of a remote folder here, if it is newer than what is here.

    Args:
        folder: where from.
        there: what lies in it.
        directory: where to.
        here: the newest set that is here.

    Returns:
        The newest of both sides, and the steps of the remote sets that were passed over.
    """
    passed_over: set[int] = set()
    for step in reversed(_steps(there)):
        if here is not None and step <= here.step:
            break
        try:
            return _bring(folder, step, there, directory), passed_over
        except ValueError as error:
            warn(f"ignoring the checkpoint at step {step} of {folder.url}: {error}")
            passed_over.add(step)
    return here, passed_over


def _bring(folder: Folder, step: int, there: _Listing, directory: Path) -> Checkpoint:
    """Bring one set here.

    Raises:
        ValueError: it is not what its manifest says; then nothing of it that counts is here.
    """
    if not (files := _their_manifest(folder, step, there)):
        raise ValueError("its manifest is damaged")
    for name, file in files.items():
        if _size(there, name) != file["bytes"]:
            raise ValueError(f"{name} is not there, or not whole")
    (directory / manifest_name(step)).unlink(missing_ok=True)
    for name, file in files.items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != file["sha256"]:
            folder.download(name, there[name], path)
            if sha256_of(path) != file["sha256"]:
                path.unlink()
                raise ValueError(f"{name} is damaged")
    folder.download(manifest_name(step), there[manifest_name(step)], directory / manifest_name(step))
    return Checkpoint(directory, step, tuple(files))


def fetch_checkpoint(url: str, cache: Path) -> Checkpoint:
    """The checkpoint that `--resume_checkpoint URL` means, copied to a cache; see `open_checkpoint`.

    Raises:
        UserError: there is none, it is damaged, or the URL cannot be read.
    """
    parent, name = run_url(url), normalised(url).rpartition("/")[2]
    folder = Folder(parent)
    there = folder.files()
    if parent == normalised(url):
        newest, _ = newest_set(folder, there, cache / local_name(parent))
        if newest is None:
            raise UserError(f"{url}: holds no complete checkpoint")
        return newest
    if name not in there:
        raise UserError(f"no such checkpoint: {url}")
    number = re.sub(r"\D", "", name)
    manifest = manifest_name(int(number))
    beside = {
        f: there[f]
        for f in there
        if f == manifest or re.fullmatch(rf".*\D{number}\.(pt|safetensors|cache|json)", f)
    }
    return open_checkpoint(fetch_together(folder, beside, cache) / name)


def run_url(url: str) -> str:
    """The run that a URL means: itself, or the folder of a modelNNNNNN.pt."""
    parent, _, name = normalised(url).rpartition("/")
    return parent if re.fullmatch(r"model\d+\.(pt|safetensors)", name) else normalised(url)


def _is_record(name: str) -> bool:
    return file_step(name) is None and manifest_step(name) is None and not name.startswith(".")


def _steps(there: _Listing) -> list[int]:
    return sorted(step for name in there if (step := manifest_step(name)) is not None)


def _size(there: _Listing, name: str) -> int:
    return there[name].size if name in there else -1


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _their_manifest(folder: Folder, step: int, there: _Listing) -> dict[str, dict[str, Any]]:
    """A set's manifest as it is there; empty if there is none."""
    name = manifest_name(step)
    if not 0 <= _size(there, name) <= MANIFEST_BYTES:
        return {}
    try:
        return parse_manifest(folder.read(name), step)
    except ValueError:
        return {}
