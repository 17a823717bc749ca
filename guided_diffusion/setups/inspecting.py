"""What a checkpoint or folder is: a configuration that works, from what it says and what its shapes show."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from ..config.adm_shapes import HIDDEN, adm_settings, common_keys, known_like, shown_by
from ..config.loading import experiment_of, mapping_text, override_values
from ..config.settings import Denoiser, Experiment, free_to_differ
from ..errors import UserError
from ..io.description import read_description
from ..runs.checkpoint import newest_checkpoint
from ..runs.provenance import described_experiment
from ..runs.weights import (
    HEAD_PREFIX,
    denoising_network,
    is_latent_diffusion,
    load_model_folder,
    load_network,
    read_state_dict,
    require_fit,
)
from ..script_util import build_network

_OF_DIFFUSERS = ("conv_in.", "down_blocks.", "transformer_blocks.", "pos_embed.")


@dataclass(frozen=True)
class Inspected:
    """What was found.

    Attributes:
        weights: the file, or the folder, that holds the network.
        experiment: its configuration.
        lines: what a reader should know of it.
    """

    weights: Path
    experiment: Experiment
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The configuration as YAML, as short as it says all: `image_sample.py --config` takes it."""
        return mapping_text(_telling_keys(self.experiment.student))


def inspect(path: Path, overrides: Sequence[str] = ()) -> Inspected:
    """Find out what network a file or folder holds.

    Args:
        path: a checkpoint, a run's directory, of whose newest checkpoint the slowest averages are taken, or a
            folder of diffusers'.
        overrides: "key=value", what it does not say of itself.

    Raises:
        UserError: unreadable, no network that is known, something that it does not say and `overrides` do not
            give, or weights that do not fit what was found.
    """
    weights, lines = path, []
    overrides = [override.removeprefix("student.") for override in overrides]
    if path.is_dir() and (newest := newest_checkpoint(path)):
        averages = {}
        for name in sorted((n for n in newest.files if n.startswith("ema_")), reverse=True):
            with suppress(ValueError):  # not ema_RATE_NNNNNN
                averages[float(name.split("_")[1])] = name
        slowest = averages[max(averages)] if averages else ""
        weights = path / slowest if slowest else newest.path("model")
        lines.append(f"{path}: a run's directory; of its newest checkpoint {weights.name} is taken")
    if weights.is_dir():
        state: Mapping[str, th.Tensor] = load_model_folder(weights)
        experiment = described_experiment(weights, overrides)
        found = f"a folder of diffusers', architecture {experiment.student.architecture.architecture}"
    elif read_description(weights):
        state = denoising_network(read_state_dict(weights), weights)
        experiment = described_experiment(weights, overrides)
        found = f"a checkpoint of this program's, of configuration {experiment.name}, which it says itself"
    else:
        whole = read_state_dict(weights)
        state = denoising_network(whole, weights)
        found, keys, notes = _found_in(whole, state, weights, overrides)
        experiment = experiment_of(keys, weights, overrides)
        lines += notes
    body = {name: value for name, value in state.items() if not name.startswith(HEAD_PREFIX)}
    with th.device("meta"):
        network, _ = build_network(experiment.student)
    require_fit(network, network.from_diffusers(body) if weights.is_dir() else body, weights)
    lines.insert(0, f"{weights}: {found}; {_size(body)}")
    return Inspected(weights, experiment, tuple(lines))


@th.no_grad()
def check(inspected: Inspected) -> str:
    """Build the network, load it strictly, and take its first step from noise.

    Returns:
        What came out, in a line.

    Raises:
        UserError: numbers that are not finite.
    """
    network, process = build_network(inspected.experiment.student)
    load_network(network, inspected.weights)
    noise = th.randn(1, *network.shape, generator=th.Generator().manual_seed(0))
    t = th.tensor([process.num_timesteps - 1])
    y = {} if network.num_classes is None else {"y": th.zeros(1, dtype=th.int64)}
    step = process.p_sample(network.eval(), noise, t, model_kwargs=y)
    out = th.cat([step["sample"], step["pred_xstart"]])
    if not out.isfinite().all():
        raise UserError(f"{inspected.weights}: its first step from noise gives numbers that are not finite")
    return (
        f"checked: loads strictly; its first step from noise is finite, within {float(out.abs().max()):.3g}"
    )


def _found_in(
    whole: Mapping[str, th.Tensor], state: Mapping[str, th.Tensor], path: Path, overrides: Sequence[str]
) -> tuple[str, dict[str, Any], list[str]]:
    """What a file that says nothing of itself is, its keys, and further lines.

    Raises:
        UserError: no ADM U-Net, or what its weights do not show is not given.
    """
    shown = shown_by({name: tuple(value.shape) for name, value in state.items()})
    if shown is None:
        raise UserError(f"{path}: {_what_else(state)}")
    found, lines = "an ADM U-Net (guided-diffusion's)", []
    given = override_values(overrides)
    hidden: dict[str, Any] = {}
    if is_latent_diffusion(whole):
        found, hidden = "a latent diffusion model of CompVis'", {"use_new_attention_order": False}
    if any(name.startswith(HEAD_PREFIX) for name in state):
        found = f"a student of the original TCCD's, with its noise encoder ({HEAD_PREFIX}*)"
    if known := known_like(shown):
        hidden |= common_keys(known)
        names = " or ".join(model.name for model in known)
        equal = " (of equal shapes)" if len(known) > 1 else ""
        lines.append(f"its shapes are those of {names}{equal}; what they do not show is taken from there")
    if "num_heads" in given:
        hidden.pop("num_head_channels", None)
    hidden |= given
    told = {*hidden, *(["num_head_channels"] if "num_heads" in given else [])}
    missing = [name for name in HIDDEN if name not in told]
    values = HIDDEN | {"vae_path": "DIR (its VAE, as a folder of diffusers')"}
    in_latents = is_latent_diffusion(whole) or "vae_scale" in hidden or shown["channels"] != 3
    if in_latents and "vae_path" not in given:
        missing.append("vae_path")
    if missing:
        raise UserError(
            f"{path}: is {found}; give what its weights do not show: "
            + " ".join(f"{name}={values[name]}" for name in missing)
        )
    if not isinstance(hidden["image_size"], int) or isinstance(hidden["image_size"], bool):
        raise UserError(f"image_size must be a whole number, not '{hidden['image_size']!s:.60}'")
    if shown["labels"] and "null_class" not in given:
        lines.append(f"it takes {shown['labels']} labels; null_class=true if the last means no class")
    return found, adm_settings(shown, hidden), lines


def _what_else(state: Mapping[str, th.Tensor]) -> str:
    """Of a state dict that is no ADM U-Net's: what it is."""
    if any(".transformer_blocks." in name and "input_blocks." in name for name in state):
        return "is a U-Net with cross-attention (text to image), which no network here is"
    if any(name.startswith(_OF_DIFFUSERS) for name in state):
        return (
            "is a network of diffusers' without its configuration: name the folder that has its config.json"
        )
    names = ", ".join(list(state)[:3]) or "nothing"
    return f"is no network that is known here; it holds {names:.120}"


def _size(state: Mapping[str, th.Tensor]) -> str:
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return f"{sum(value.numel() for value in state.values()) / 1e6:.2f}M parameters in {' and '.join(kinds)}"


def _telling_keys(denoiser: Denoiser) -> dict[str, Any]:
    """Keys whose values matter: those that say what was trained, and those that are not the defaults."""
    keys: dict[str, Any] = {}
    for part in (denoiser.architecture, denoiser.process, denoiser.space):
        usual = type(part)()
        for name, value in vars(part).items():
            matters = part is not denoiser.space and not free_to_differ(name, part)
            if matters or value != getattr(usual, name):
                keys[name] = value
    return keys
