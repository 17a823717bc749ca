"""Reading a network's weights strictly, whoever saved them."""

import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch as th
from torch import nn

from .. import dist_util
from ..config.foreign import folder_keys
from ..config.registry import ARCHITECTURES
from ..config.settings import Denoiser, flat, free_to_differ
from ..errors import UserError
from ..io.description import read_description
from ..io.model_folder import read_model_folder
from ..io.safetensors_file import read_safetensors
from ..io.torch_file import read_torch_file
from ..networks.base import DenoisingNetwork
from ..respace import SpacedDiffusion
from ..script_util import build_network, build_space

_LDM_PREFIX = "model.diffusion_model."
HEAD_PREFIX = "out_embed."  # of the noise encoder inside the original TCCD's checkpoints
# What attention was called in a UNet2DModel before diffusers 0.15.
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
        raise UserError(f"{path}: only {sum(there)} of its {len(there)} weights have an average")
    kind = "averaged weights (model_ema)" if all(there) else "weights (it has no averaged ones)"
    dist_util.say(f"{path}: a latent diffusion model; its U-Net's {kind} are taken")
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
    is_folder = Path(path).is_dir()
    description = _told_by_folder(denoiser, path) if is_folder else read_description(path)
    for part in ("architecture", "process"):
        told, configured = description.get(part, {}), getattr(denoiser, part)
        for name, value in _as_configured(told, configured).items():
            ours = getattr(configured, name, value)
            if ours != value and not free_to_differ(name, configured):
                raise UserError(
                    f"{path}: was trained with {name} {value!r}, but {where}{name} is {ours!r}; "
                    f"{where}{name}={value} goes with it"
                    + (", or leave out the configuration: the folder says what it is" if is_folder else "")
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
    body, head = _read_network(module, path)
    load_strictly(module, body, path)
    return head


def _read_network(
    module: DenoisingNetwork, path: str | os.PathLike
) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
    """A network's entries under the names that `module` has, and its noise encoder's; see `load_network`."""
    if Path(path).is_dir():
        return dict(module.from_diffusers(load_model_folder(path))), {}
    state = dict(load_state_dict(path))
    head = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
    return {k: v for k, v in state.items() if not k.startswith(HEAD_PREFIX)}, head


def build_loaded(
    denoiser: Denoiser, path: str | os.PathLike, where: str = ""
) -> tuple[DenoisingNetwork, SpacedDiffusion]:
    """`build_network` with a checkpoint's weights, float32 on the CPU.

    The file may say itself how large the network is: whether it has the weights of one so large is found out
    before there is one.

    Args:
        denoiser: the configuration section.
        path: the checkpoint, or a diffusers folder.
        where: the section's name in messages, such as "teacher.".

    Raises:
        UserError: as `build_network` and `load_network`.
    """
    is_ours = denoiser.architecture.architecture in ARCHITECTURES  # another may not know the meta device
    with th.device("meta") if is_ours else nullcontext():
        network, process = build_network(denoiser, where)
    state, _ = _read_network(network, path)
    require_fit(network, state, path)
    if is_ours:
        network, process = build_network(denoiser, where)
    network.load_state_dict(state)
    return network, process


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
