"""Checkpoints: sets of files that are complete or do not count.

A run's checkpoint at step N is `modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt` (plain ADM state dicts; with
`run.weights_format` `.safetensors` instead or beside), `optNNNNNN.pt`, `headNNNNNN.pt` (what the objective
trains beside the network) and, in distillation, `teacher-state-NNNNNN.cache` (the pool); `best` adds
`scoreNNNNNN.json` to some.
`checkpointNNNNNN.json` is written last, with every file's size and checksum: a set without it, or that
differs from it, is no checkpoint.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from safetensors.torch import save_file

from ..config.settings import Run, Training
from ..errors import UserError
from ..io.description import DESCRIPTION, described
from ..io.files import atomic_path, sha256_of, write_text
from ..io.json_text import parse_json
from ..io.progress import warn

_MANIFEST = re.compile(r"checkpoint(\d{6,})\.json", re.ASCII)
_MODEL = re.compile(r"model(\d{6,})\.(?:pt|safetensors)", re.ASCII)
_OF_A_SET = re.compile(
    r"(?:model|ema_[^/]*_|opt|head|teacher-state-|score)(\d{6}|[1-9]\d{6,})\.(?:pt|safetensors|cache|json)",
    re.ASCII,
)
MANIFEST_BYTES = 1 << 20  # a larger file is none


@dataclass(frozen=True)
class Checkpoint:
    """A complete set of files of one step."""

    directory: Path
    step: int
    files: tuple[str, ...]

    def path(self, name: str) -> Path:
        """The file called `name`, such as "model" or "ema_0.9999"."""
        return self.directory / self._file(name)

    def has(self, name: str) -> bool:
        """Whether the set holds it."""
        return self._file(name) in self.files

    def _file(self, name: str) -> str:
        names = [file_name(name, self.step), file_name(name, self.step, ".safetensors")]
        return next((file for file in names if file in self.files), names[0])


def file_name(name: str, step: int, suffix: str = ".pt") -> str:
    """`modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt`, ..., `teacher-state-NNNNNN.cache`, `scoreNNNNNN.json`."""
    if name == "pool":
        return f"teacher-state-{step:06d}.cache"
    if name == "score":
        return f"score{step:06d}.json"
    return f"{name}{'_' if name.startswith('ema') else ''}{step:06d}{suffix}"


def file_names(name: str, step: int, weights_format: str) -> list[str]:
    """The files that hold `name`: of a network one or two, as `run.weights_format` says."""
    if not _is_network(name) or weights_format == "pt":
        return [file_name(name, step)]
    suffixes = [".safetensors"] if weights_format == "safetensors" else [".pt", ".safetensors"]
    return [file_name(name, step, suffix) for suffix in suffixes]


def _is_network(name: str) -> bool:
    return name == "model" or name.startswith("ema_")


def manifest_name(step: int) -> str:
    """`checkpointNNNNNN.json`."""
    return f"checkpoint{step:06d}.json"


def manifest_step(name: str) -> int | None:
    """The step of the manifest called so; None if it is no manifest's name."""
    return int(match[1]) if (match := _MANIFEST.fullmatch(name)) else None


def file_step(name: str) -> int | None:
    """The step of the set that a file called so belongs to; None if it is of no set."""
    return int(match[1]) if (match := _OF_A_SET.fullmatch(name)) else None


def save_checkpoint(
    directory: Path,
    step: int,
    contents: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
    weights_format: str = "pt",
) -> Checkpoint:
    """Write a checkpoint; nothing of it counts before all of it is on disk.

    Args:
        directory: where to.
        step: iterations done.
        contents: by name, what `torch.save` takes, or a function that writes the path it is given.
        description: of the network, written into its files; see `io.description`.
        weights_format: of the network's files, see `run.weights_format`.
    """
    sums = {}
    told = {**(description or {}), "step": step}
    for name, content in contents.items():
        for file in file_names(name, step, weights_format):
            with atomic_path(directory / file) as temporary:
                if callable(content):
                    content(temporary)
                elif file.endswith(".safetensors"):
                    plain = {key: value.contiguous() for key, value in content.items()}
                    save_file(plain, temporary, metadata={"format": "pt", DESCRIPTION: json.dumps(told)})
                else:
                    th.save(described(content, told) if _is_network(name) else content, temporary)
                sums[file] = {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    _write_manifest(directory, step, sums)
    return Checkpoint(directory, step, tuple(sums))


def add_file(checkpoint: Checkpoint, name: str, write: Callable[[Path], object]) -> None:
    """Add a file to a checkpoint, which is complete before and after; `write` is given its path."""
    path = checkpoint.path(name)
    files = read_manifest(checkpoint.directory, checkpoint.step)
    with atomic_path(path) as temporary:
        write(temporary)
        files[path.name] = {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    _write_manifest(checkpoint.directory, checkpoint.step, files)


def drop_file(checkpoint: Checkpoint, name: str) -> None:
    """Remove one file of a checkpoint, which stays complete without it."""
    if not checkpoint.has(name):
        return
    path = checkpoint.path(name)
    files = read_manifest(checkpoint.directory, checkpoint.step)
    del files[path.name]
    _write_manifest(checkpoint.directory, checkpoint.step, files)
    path.unlink()


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints whose manifest and files are there with the right sizes, the oldest first."""
    found = []
    for path in directory.glob("checkpoint*.json"):
        if (step := manifest_step(path.name)) is None:
            continue
        try:
            files = read_manifest(directory, step)
            sizes = {name: (directory / name).stat().st_size for name in files}
            wrong = [name for name in files if sizes[name] != files[name]["bytes"]]
        except (OSError, ValueError) as error:
            warn(f"ignoring {path}: {error}")
            continue
        if wrong:
            warn(f"ignoring {path}: {wrong[0]} has another size than when it was written")
            continue
        found.append(Checkpoint(directory, step, tuple(files)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint whose files still have their checksums; None if there is none."""
    for checkpoint in reversed(complete_checkpoints(directory)):
        if not (damage := _damage(checkpoint)):
            return checkpoint
        warn(f"ignoring the checkpoint at step {checkpoint.step}: {damage}")
    return None


def _damage(checkpoint: Checkpoint) -> str:
    """What is wrong with a file of a complete checkpoint; "" if nothing is."""
    try:
        for name, file in read_manifest(checkpoint.directory, checkpoint.step).items():
            if sha256_of(checkpoint.directory / name) != file["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, and which of them with their pools.

    Attributes:
        keep_last: how many of the newest checkpoints stay; 0 for all.
        keep_every: checkpoints at multiples of this stay too; 0 for none.
        keep_pool_every: pools at multiples of this stay besides the newest two; -1 for none. Two, so
            that a run whose newest checkpoint is damaged still resumes exactly from the one before.
    """

    keep_last: int = 0
    keep_every: int = 0
    keep_pool_every: int = -1

    @classmethod
    def of(cls, training: Training, run: Run) -> "Retention":
        """As a configuration says."""
        return cls(run.keep_last, run.keep_every, training.cache_save_interval)

    def superfluous(self, steps: Sequence[int], best: int | None = None) -> list[int]:
        """Those of some checkpoints, the oldest first, that need not stay; `best` stays besides."""
        old = steps[: -self.keep_last] if self.keep_last else []
        return [step for step in old if step != best and (not self.keep_every or step % self.keep_every)]

    def without_pool(self, steps: Sequence[int]) -> list[int]:
        """Those of some checkpoints, the oldest first, whose pools need not stay."""
        return [step for step in steps[:-2] if self.keep_pool_every < 1 or step % self.keep_pool_every]


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, its manifest first, so that what is left never counts as complete."""
    (checkpoint.directory / manifest_name(checkpoint.step)).unlink()
    for name in checkpoint.files:
        (checkpoint.directory / name).unlink(missing_ok=True)


def read_manifest(directory: Path, step: int) -> dict[str, dict[str, Any]]:
    """Each file's "bytes" and "sha256".

    Raises:
        ValueError: as `parse_manifest`; or OSError.
    """
    path = directory / manifest_name(step)
    if path.stat().st_size > MANIFEST_BYTES:
        raise ValueError("too large for a manifest")
    return parse_manifest(path.read_bytes(), step)


def parse_manifest(content: bytes, step: int) -> dict[str, dict[str, Any]]:
    """Each file's "bytes" and "sha256".

    Raises:
        ValueError: it is no manifest of this step's. Its names are not to be believed either: files
            that it names are removed in time.
    """
    try:
        files = parse_json(content)["files"]
        valid = all(
            file_step(name) == step and file.keys() == {"bytes", "sha256"} for name, file in files.items()
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a manifest ({error})") from None
    models = {file_name("model", step, suffix) for suffix in (".pt", ".safetensors")}
    if not valid or not models & set(files):
        raise ValueError("not a manifest of this step's files")
    return files


def manifest_text(step: int, files: Mapping[str, Any]) -> str:
    """What `parse_manifest` reads."""
    return json.dumps({"step": step, "files": files}, indent=1)


def _write_manifest(directory: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    write_text(directory / manifest_name(step), manifest_text(step, files))


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint that `--resume_checkpoint` means.

    Args:
        path: a run directory (its newest complete checkpoint), or a `modelNNNNNN.pt` (or `.safetensors`).
            Either may be the originals', without manifests: then it is the newest such file, with whatever
            lies beside it under the same number.

    Raises:
        UserError: there is none, or the file's name tells no step.
    """
    path = Path(path)
    if path.is_dir():
        if newest := newest_checkpoint(path):
            return newest
        models = {int(match[1]): file for file in path.iterdir() if (match := _MODEL.fullmatch(file.name))}
        if not models or any(manifest_step(file.name) is not None for file in path.iterdir()):
            raise UserError(f"{path}: holds no complete checkpoint")
        path = models[max(models)]
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    if not (match := _MODEL.fullmatch(path.name)):
        raise UserError(f"{path}: to resume, name a run directory or a file called modelNNNNNN.pt")
    number = match[1]
    step = int(number)
    if (path.parent / manifest_name(step)).exists():
        named = next((c for c in complete_checkpoints(path.parent) if c.step == step), None)
        damage = _damage(named) if named else "it is not complete"
        if named is None or damage:
            raise UserError(f"{path}: differs from {manifest_name(step)}: {damage}")
        return named
    beside = [
        p.name
        for p in path.parent.iterdir()
        if p.stem.endswith(number) and p.suffix in (".pt", ".safetensors", ".cache")
    ]
    return Checkpoint(path.parent, step, tuple(beside))
