"""Checkpoints: reading networks strictly, and sets of files that are complete or do not count.

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
from torch import nn

from .. import dist_util
from ..config.foreign import folder_keys
from ..config.settings import Denoiser, Run, Training, flat, free_to_differ
from ..errors import UserError
from ..io.description import DESCRIPTION, described, read_description
from ..io.files import atomic_path, sha256_of, write_text
from ..io.model_folder import read_model_folder
from ..io.progress import warn
from ..io.safetensors_file import read_safetensors
from ..io.torch_file import read_torch_file
from ..networks.base import DenoisingNetwork
from ..script_util import build_space

_LDM_PREFIX = "model.diffusion_model."
HEAD_PREFIX = "out_embed."  # of the noise encoder inside the original TCCD's checkpoints
_MANIFEST = re.compile(r"checkpoint(\d{6,})\.json", re.ASCII)
_MODEL = re.compile(r"model(\d{6,})\.(?:pt|safetensors)", re.ASCII)
_OF_A_SET = re.compile(
    r"(?:model|ema_[^/]*_|opt|head|teacher-state-|score)(\d{6}|[1-9]\d{6,})\.(?:pt|safetensors|cache|json)",
    re.ASCII,
)
# What attention was called in a UNet2DModel before diffusers 0.15.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MANIFEST_BYTES = 1 << 20  # a larger file is none


def load_state_dict(path: str | os.PathLike) -> dict[str, th.Tensor]:
    """Read a state dict, a mapping of names to tensors: `.safetensors`, `.pt`, or Lightning's `.ckpt`.

    Of a latent diffusion model's (CompVis) it is the denoising network's entries, under ADM's names.

    Raises:
        UserError: as `read_torch_file`, or if it is no state dict.
    """
    return denoising_network(read_state_dict(path), path)


def read_state_dict(path: str | os.PathLike) -> Mapping[str, th.Tensor]:
    """`load_state_dict` with every entry of the file, under its own name.

    Training programs save it among other things, as `state_dict`, and DistributedDataParallel puts `module.`
    before all names; both are seen through.

    Raises:
        UserError: missing or damaged file, or it holds something else.
    """
    is_safetensors = Path(path).suffix == ".safetensors"
    found = read_safetensors(path) if is_safetensors else read_torch_file(path)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, th.Tensor) for k, v in state.items()
    ):
        holds = f"; it has {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
        raise UserError(f"{path}: holds no state dict (a mapping of names to tensors){holds:.200}")
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def is_latent_diffusion(state: Mapping[str, th.Tensor]) -> bool:
    """Whether a state dict is a whole latent diffusion model's (CompVis)."""
    return any(name.startswith(_LDM_PREFIX) for name in state)


def denoising_network(state: Mapping[str, th.Tensor], path: str | os.PathLike) -> dict[str, th.Tensor]:
    """`state` itself, or of a latent diffusion model's the U-Net: its averaged weights if there are any.

    LDM has the U-Net as `model.diffusion_model.NAME`; its averaged weights as `model_ema.` and the name from
    `diffusion_model.` on without its dots; and the VAE as `first_stage_model.NAME`, which is passed over.

    Raises:
        UserError: only some of the weights are averaged.
    """
    network = {k.removeprefix(_LDM_PREFIX): k for k in state if k.startswith(_LDM_PREFIX)}
    if not network:
        return dict(state)
    averaged = {name: f"model_ema.{key[6:].replace('.', '')}" for name, key in network.items()}
    there = [key in state for key in averaged.values()]
    if any(there) and not all(there):
        raise UserError(f"{path}: of its {len(there)} weights {sum(there)} are averaged, the others not")
    if dist_util.rank() == 0:
        kind = "averaged weights (model_ema)" if all(there) else "weights (it has no averaged ones)"
        print(f"{path}: a latent diffusion model; its U-Net's {kind} are taken", flush=True)
    return {name: state[key] for name, key in (averaged if all(there) else network).items()}


def require_agreement(denoiser: Denoiser, path: str | os.PathLike, where: str = "") -> None:
    """Refuse a configuration that contradicts what a checkpoint of ours says of itself.

    Args:
        denoiser: the configured architecture, process and space.
        path: the checkpoint.
        where: the configuration's section in messages, such as "teacher.".

    Raises:
        UserError: a key on which the two differ, with both values.
    """
    description = _told_by_folder(denoiser, path) if Path(path).is_dir() else read_description(path)
    for part in ("architecture", "process"):
        told, configured = description.get(part, {}), getattr(denoiser, part)
        for name, value in _as_configured(told, configured).items():
            ours = getattr(configured, name, value)
            if ours != value and not free_to_differ(name, configured):
                raise UserError(
                    f"{path}: was trained with {name} {value!r}, but {where}{name} is {ours!r}; "
                    f"{where}{name}={value} goes with it"
                )
    if told := description.get("space"):
        ours = build_space(denoiser).describe()
        for name, value in told.items():
            if ours.get(name) != value:
                raise UserError(
                    f"{path}: was trained on {told.get('kind')} with {name} {value!r}, but here it is "
                    f"{ours.get(name)!r}; {where}vae_path and {where}vae_scale say what they are"
                )


def _as_configured(told: Mapping[str, Any], configured: Any) -> dict[str, Any]:
    """What a checkpoint says of a part, betas in the form that a configured process has them."""
    try:
        alike = type(configured)(**{name: value for name, value in told.items() if hasattr(configured, name)})
    except (TypeError, ValueError, ArithmeticError):
        return dict(told)
    return {name: getattr(alike, name, value) for name, value in told.items()}


def _told_by_folder(denoiser: Denoiser, path: str | os.PathLike) -> dict[str, Any]:
    """What a diffusers folder says, as `read_description` has it."""
    told = folder_keys(read_model_folder(Path(path)), flat(denoiser))
    return {
        part: {name: told[name] for name in vars(getattr(denoiser, part)) if name in told}
        for part in ("architecture", "process")
    }


def load_network(module: DenoisingNetwork, path: str | os.PathLike) -> dict[str, th.Tensor]:
    """Load a network's checkpoint strictly, fp16 or fp32, of ADM's, DKDM's, TCCD's, diffusers' or our making.

    Args:
        module: receives the weights, in its own dtype.
        path: the checkpoint, or a diffusers folder.

    Returns:
        The noise encoder's entries that the original TCCD stores along (prefix `out_embed.` removed);
        empty for plain checkpoints.

    Raises:
        UserError: entries missing, unexpected or of another shape: a few of each, and how many.
    """
    if Path(path).is_dir():
        load_strictly(module, module.from_diffusers(load_model_folder(path)), path)
        return {}
    state = load_state_dict(path)
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    body = {k: v for k, v in state.items() if not k.startswith(HEAD_PREFIX)}
    load_strictly(module, body, path)
    return head


def load_model_folder(path: str | os.PathLike) -> dict[str, th.Tensor]:
    """The weights of a diffusers folder, under the names of today's diffusers.

    Raises:
        UserError: as `read_model_folder`, or damaged weights.
    """
    state: dict[str, th.Tensor] = {}
    for file in read_model_folder(Path(path)).weights:
        state |= read_safetensors(file, "model")
    return {_OLD_ATTENTION.sub(lambda m: f"{m[1]}{_OLD_NAMES[m[2]]}.", name): v for name, v in state.items()}


def load_strictly(module: nn.Module, state: Mapping[str, th.Tensor], origin: Any) -> None:
    """`load_state_dict` that names what does not fit in one line; see `load_network`."""
    require_fit(module, state, origin)
    module.load_state_dict(dict(state))


def require_fit(module: nn.Module, state: Mapping[str, th.Tensor], origin: Any) -> None:
    """Refuse a state dict whose entries are not a module's, by name, shape and kind.

    Args:
        module: the module; it may lie on the meta device.
        state: the entries.
        origin: where they come from, for the message.

    Raises:
        UserError: what does not fit, in one line.
    """
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
        files = json.loads(content)["files"]
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
