"""Folders in which diffusers keeps models: what their JSON and the headers of their weights say.

Nothing of a folder is ever run, and no pickle in it is opened: only JSON and safetensors are read. Imports
no torch.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from .files import read_object, sha256_of

# Which of a pipeline's parts denoises, and which decodes what is denoised.
PIPELINES = {
    "DDPMPipeline": ("unet", None),
    "DDIMPipeline": ("unet", None),
    "LDMPipeline": ("unet", "vqvae"),
    "DiTPipeline": ("transformer", "vae"),
}
_NETWORKS = ("unet", "transformer")
_WEIGHTS = "diffusion_pytorch_model"
_JSON_BYTES = 16 << 20  # larger files are no model's
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILE = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".json", ".yaml", ".cache")


@dataclass(frozen=True)
class ModelFolder:
    """A denoising network of diffusers', and what its pipeline says of it.

    Attributes:
        path: the folder as it was named.
        config: the network's config.json.
        scheduler: the scheduler's config; None where there is none.
        vae: the folder of the VAE; None for a pipeline in pixels.
        files: config.json and the network's weights.
        shapes: of the weights, by name, as the files' headers say.
    """

    path: Path
    config: dict[str, Any]
    scheduler: dict[str, Any] | None
    vae: Path | None
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return self.files[1:]


def read_model_folder(path: str | Path) -> ModelFolder:
    """Look into a pipeline's folder (with model_index.json), or into that of a network alone.

    Raises:
        UserError: it is neither, of a class that is not known, damaged, without safetensors weights, or
            asking for code of its own.
    """
    path = Path(path)
    pipeline, vae, scheduler = "", None, None
    if (path / "model_index.json").is_file():
        index = read_json(path / "model_index.json")
        pipeline = _known_pipeline(index, path)
        network, decoder = PIPELINES[pipeline]
        folder = _part(path, network)
        if decoder and _names_a_class(index.get(decoder)):
            vae = path / decoder
    else:
        folder = next((path / name for name in _NETWORKS if (path / name).is_dir()), path)
    beside = (_part(path, "scheduler") if pipeline else path / "scheduler") / "scheduler_config.json"
    if beside.is_file():
        scheduler = read_json(beside)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: is no model's folder: it has neither model_index.json nor config.json")
    config = read_json(folder / "config.json")
    weights = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weights:
        shapes |= weight_shapes(file)
    return ModelFolder(path, config, scheduler, vae, (folder / "config.json", *weights), shapes)


def weights_sha256(path: str | Path) -> str:
    """SHA-256 of a checkpoint: of the file, or of a folder's config.json and weights together."""
    path = Path(path)
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in read_model_folder(path).files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a model on the Hub, owner/name."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.endswith(_FILE)


def fetch_from_hub(name: str) -> Path:
    """The local folder of a model on the Hub, fetched (JSON and safetensors alone) if it is not there yet.

    Raises:
        UserError: it cannot be fetched, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder; to fetch it from the Hub, pip install diffusers"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # it raises its own, its HTTP library's and the system's
        told = first_line(error)
        raise UserError(
            f"{name}: no such file or folder here, and the Hub does not give a model of that name "
            f"({told:.200}); name a folder, or connect to the network"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        UserError: missing, too large, or anything else.
    """
    try:
        return read_object(path, _JSON_BYTES)
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: not readable as JSON ({told})") from None


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file.

    Raises:
        UserError: missing or damaged file.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # which needs no torch
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None


def _known_pipeline(index: Mapping[str, Any], path: Path) -> str:
    """The class of a pipeline, none of whose parts is code of its own."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise UserError(
            f"{path}: is a pipeline of class {name!r:.80}; those that can be read are {', '.join(PIPELINES)}"
        )
    network, _ = PIPELINES[name]
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        if entry != [None, None] and not _names_a_class(entry):
            raise UserError(
                f"{path}: {part} in model_index.json is {entry!r:.80}, code of its own, which is never run; "
                "only parts from diffusers and transformers are read"
            )
    if not _names_a_class(index.get(network)):
        raise UserError(f"{path}: model_index.json names no {network}")
    return name


def _names_a_class(entry: Any) -> bool:
    match entry:
        case ["diffusers" | "transformers", str(name)]:
            return name.isidentifier()
    return False


def _part(path: Path, name: str) -> Path:
    """Where a part of a pipeline lies: a folder of its name or, in old ones, the pipeline's own."""
    return path / name if (path / name).is_dir() else path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in its folder, in order.

    Raises:
        UserError: there are none, several that could be meant, or some of an index's are missing.
    """
    whole, index = folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    variants = list(folder.glob(f"{_WEIGHTS}.safetensors.index.*.json"))  # such as index.fp16.json
    if not index.is_file() and len(variants) == 1:
        index = variants[0]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        named = list(shards.values()) if isinstance(shards, dict) else []
        if not named or not all(isinstance(name, str) and Path(name).name == name for name in named):
            raise UserError(f"{index}: has no weight_map of file names in its own folder")
        names = sorted(set(named))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder}: has no {missing[0]}, which {index.name} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        several = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise UserError(f"{folder}: which of {several} is meant? Leave one, or an index of them")
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise UserError(
            f"{folder}: has pickled weights alone ({pickled[0]}), which can run code and are not opened; if "
            "you trust them, save the model again by diffusers' save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder}: has no {_WEIGHTS}.safetensors")
