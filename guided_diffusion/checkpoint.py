"""Checkpoints: reading networks strictly, and sets of files that are complete or do not count.

A run's checkpoint at step N is `modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt` (plain ADM state dicts),
`optNNNNNN.pt`, `headNNNNNN.pt` (what the objective trains beside the network) and, in distillation,
`teacher-state-NNNNNN.cache` (the pool). `checkpointNNNNNN.json` is written last, with every file's size
and checksum: a set without it, or that differs from it, is no checkpoint.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

from .errors import UserError
from .files import atomic_path, sha256_of
from .torch_file import read_torch_file

HEAD_PREFIX = "out_embed."  # of the noise encoder inside the original TCCD's checkpoints
_MANIFEST = re.compile(r"checkpoint(\d{6,})\.json", re.ASCII)
_MANIFEST_BYTES = 1 << 20
logger = logging.getLogger(__name__)


def load_state_dict(path: str | os.PathLike) -> dict[str, th.Tensor]:
    """Read a state dict: a mapping of names to tensors.

    Raises:
        UserError: as `read_torch_file`, or if it is no state dict.
    """
    state = read_torch_file(path)
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, th.Tensor) for k, v in state.items()
    ):
        raise UserError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(state)


def load_network(module: nn.Module, path: str | os.PathLike) -> dict[str, th.Tensor]:
    """Load a U-Net checkpoint strictly, fp16 or fp32, of ADM's, DKDM's, TCCD's or our making.

    Args:
        module: receives the weights, in its own dtype.
        path: the checkpoint.

    Returns:
        The noise encoder's entries that the original TCCD stores along (prefix `out_embed.` removed);
        empty for plain checkpoints.

    Raises:
        UserError: entries missing, unexpected or of another shape: a few of each, and how many.
    """
    state = load_state_dict(path)
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    body = {k: v for k, v in state.items() if not k.startswith(HEAD_PREFIX)}
    load_strictly(module, body, path)
    return head


def load_strictly(module: nn.Module, state: Mapping[str, th.Tensor], origin: Any) -> None:
    """`load_state_dict` that names what does not fit in one line; see `load_network`."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    if any(problems.values()):
        told = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in problems.items()
            if names
        ]
        raise UserError(f"{origin}: does not fit the configured network: {'; '.join(told)}")
    if not all(v.is_floating_point() == own[k].is_floating_point() for k, v in state.items()):
        raise UserError(f"{origin}: holds integers where weights are expected")
    module.load_state_dict(dict(state))


@dataclass(frozen=True)
class Checkpoint:
    """A complete set of files of one step."""

    directory: Path
    step: int
    files: tuple[str, ...]

    def path(self, name: str) -> Path:
        """The file called `name`, such as "model" or "ema_0.9999"."""
        return self.directory / file_name(name, self.step)

    def has(self, name: str) -> bool:
        """Whether the set holds it."""
        return file_name(name, self.step) in self.files


def file_name(name: str, step: int) -> str:
    """`modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt`, ..., `teacher-state-NNNNNN.cache`."""
    if name == "pool":
        return f"teacher-state-{step:06d}.cache"
    return f"{name}{'_' if name.startswith('ema') else ''}{step:06d}.pt"


def save_checkpoint(directory: Path, step: int, contents: Mapping[str, Any]) -> Checkpoint:
    """Write a checkpoint; nothing of it counts before all of it is on disk.

    Args:
        directory: where to.
        step: iterations done.
        contents: by name, what `torch.save` takes, or a function that writes the path it is given.
    """
    sums = {}
    for name, content in contents.items():
        path = directory / file_name(name, step)
        with atomic_path(path) as temporary:
            if isinstance(content, Callable):  # type: ignore[arg-type]
                content(temporary)
            else:
                th.save(content, temporary)
            sums[path.name] = {"bytes": temporary.stat().st_size, "sha256": sha256_of(temporary)}
    _write_manifest(directory, step, sums)
    return Checkpoint(directory, step, tuple(sums))


def drop_file(checkpoint: Checkpoint, name: str) -> None:
    """Remove one file of a checkpoint, which stays complete without it."""
    if not checkpoint.has(name):
        return
    path = checkpoint.path(name)
    files = _read_manifest(checkpoint.directory, checkpoint.step)
    del files[path.name]
    _write_manifest(checkpoint.directory, checkpoint.step, files)
    path.unlink()


def complete_checkpoints(directory: Path) -> list[Checkpoint]:
    """The checkpoints whose manifest and files are there with the right sizes, the oldest first."""
    found = []
    for path in directory.glob("checkpoint*.json"):
        if not (match := _MANIFEST.fullmatch(path.name)):
            continue
        try:
            files = _read_manifest(directory, int(match[1]))
            sizes = {name: (directory / name).stat().st_size for name in files}
            wrong = [name for name in files if sizes[name] != files[name]["bytes"]]
        except (OSError, ValueError) as error:
            logger.warning("ignoring %s: %s", path, error)
            continue
        if wrong:
            logger.warning("ignoring %s: %s has another size than when it was written", path, wrong[0])
            continue
        found.append(Checkpoint(directory, int(match[1]), tuple(files)))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest complete checkpoint whose files still have their checksums; None if there is none."""
    for checkpoint in reversed(complete_checkpoints(directory)):
        if not (damage := _damage(checkpoint)):
            return checkpoint
        logger.warning("ignoring the checkpoint at step %d: %s", checkpoint.step, damage)
    return None


def _damage(checkpoint: Checkpoint) -> str:
    """What is wrong with a file of a complete checkpoint; "" if nothing is."""
    try:
        for name, file in _read_manifest(checkpoint.directory, checkpoint.step).items():
            if sha256_of(checkpoint.directory / name) != file["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, its manifest first, so that what is left never counts as complete."""
    _manifest_path(checkpoint.directory, checkpoint.step).unlink()
    for name in checkpoint.files:
        (checkpoint.directory / name).unlink(missing_ok=True)


def _manifest_path(directory: Path, step: int) -> Path:
    return directory / f"checkpoint{step:06d}.json"


def _read_manifest(directory: Path, step: int) -> dict[str, dict[str, Any]]:
    """Each file's "bytes" and "sha256".

    Raises:
        ValueError: it is no manifest of this step's. Its names are not to be believed either: files
            that it names are removed in time.
    """
    path = _manifest_path(directory, step)
    if path.stat().st_size > _MANIFEST_BYTES:
        raise ValueError("too large for a manifest")
    try:
        files = json.loads(path.read_text())["files"]
        own = re.compile(rf"(model|ema_[^/]*_|opt|head|teacher-state-){step:06d}\.(pt|cache)")
        valid = all(
            own.fullmatch(name) and file.keys() == {"bytes", "sha256"} for name, file in files.items()
        )
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a manifest ({error})") from None
    if not valid or file_name("model", step) not in files:
        raise ValueError("not a manifest of this step's files")
    return files


def _write_manifest(directory: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    with atomic_path(_manifest_path(directory, step)) as temporary:
        temporary.write_text(json.dumps({"step": step, "files": files}, indent=1))


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint that `--resume_checkpoint` means.

    Args:
        path: a run directory (its newest complete checkpoint), or a `modelNNNNNN.pt`, which may be one
            of the originals' without a manifest: then whatever lies beside it under the same number.

    Raises:
        UserError: there is none, or the file's name tells no step.
    """
    path = Path(path)
    if path.is_dir():
        if (newest := newest_checkpoint(path)) is None:
            raise UserError(f"{path}: holds no complete checkpoint")
        return newest
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    if not (match := re.fullmatch(r"model(\d+)\.pt", path.name)):
        raise UserError(f"{path}: to resume, name a run directory or a file called modelNNNNNN.pt")
    number = match[1]
    step = int(number)
    if _manifest_path(path.parent, step).exists():
        named = next((c for c in complete_checkpoints(path.parent) if c.step == step), None)
        damage = _damage(named) if named else "it is not complete"
        if named is None or damage:
            raise UserError(f"{path}: differs from {_manifest_path(path.parent, step).name}: {damage}")
        return named
    beside = [
        p.name for p in path.parent.iterdir() if p.stem.endswith(number) and p.suffix in (".pt", ".cache")
    ]
    return Checkpoint(path.parent, step, tuple(beside))
