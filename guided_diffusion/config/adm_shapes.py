"""What the names and shapes of an ADM U-Net's weights say of its configuration. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .known_models import KNOWN_MODELS, KnownModel

Shapes = Mapping[str, tuple[int, ...]]
_OUTPUT_BLOCK = re.compile(r"output_blocks\.(\d+)\.(\d+)\.(conv\.weight|in_layers\.0\.weight)", re.ASCII)
# What the shapes do not say, with the values it may have.
HIDDEN = {
    "image_size": "N",
    "num_head_channels": "N (or num_heads=N)",
    "use_new_attention_order": "true|false",
    "diffusion_steps": "N",
    "noise_schedule": "linear|cosine|scaled_linear",
}


def shown_by(shapes: Shapes) -> dict[str, Any] | None:
    """What the weights of an ADM U-Net show of it; None if they are of something else.

    A level is as many blocks on the way up as lie between two that double the size; those have a convolution
    more, or with `resblock_updown` a residual block.

    Args:
        shapes: by name.

    Returns:
        Configuration keys, and "channels" of its samples, "labels" that it takes (0 without classes) and
        "attention_levels", the levels that have attention, 0 the largest.
    """
    parts: dict[str, list[str]] = {}
    for name in shapes:
        if match := _OUTPUT_BLOCK.fullmatch(name):
            parts.setdefault(match[1], []).append(match[3])
    doubling = [kinds for kinds in parts.values() if len(kinds) > 1]
    levels = len(doubling) + 1
    if not parts or len(parts) % levels or any(0 in shape for shape in shapes.values()):
        return None
    per_level = len(parts) // levels
    try:
        num_channels = shapes["time_embed.0.weight"][1]
        channels = shapes["input_blocks.0.0.weight"][1]
        firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
        widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
        multiples = [width / num_channels for width in widths]
        condition = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
        outputs = shapes["out.2.weight"][0]
        labels = shapes.get("label_emb.weight", (0,))[0]
    except LookupError:
        return None
    if shapes["time_embed.0.weight"] != (4 * num_channels, num_channels):
        return None
    return {
        "num_channels": num_channels,
        "num_res_blocks": per_level - 1,
        "channel_mult": ",".join(f"{m:.0f}" if m.is_integer() else repr(m) for m in multiples),
        "use_scale_shift_norm": condition == 2 * widths[0],
        "resblock_updown": bool(doubling) and not any("conv.weight" in kinds for kinds in doubling),
        "learn_sigma": outputs == 2 * channels,
        "channels": channels,
        "labels": labels,
        "attention_levels": tuple(i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in shapes),
    }


def known_like(shown: Mapping[str, Any]) -> list[KnownModel]:
    """The known models whose weights show the same."""
    return [model for model in KNOWN_MODELS if _shown_by_known(model) == shown]


def common_keys(models: Sequence[KnownModel]) -> dict[str, Any]:
    """The configuration keys of some known models, as far as all agree."""
    first, *others = [model.keys for model in models]
    return {key: value for key, value in first.items() if all(value == other.get(key) for other in others)}


def adm_settings(shown: Mapping[str, Any], hidden: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration keys of a U-Net.

    Args:
        shown: what `shown_by` returned.
        hidden: further keys, "image_size" among them; "null_class" says that the last label is that.
    """
    keys = {
        key: value for key, value in shown.items() if key not in ("channels", "labels", "attention_levels")
    }
    levels = shown["attention_levels"]
    keys["attention_resolutions"] = ",".join(str(hidden["image_size"] >> level) for level in levels)
    keys["class_cond"] = bool(shown["labels"])
    if shown["labels"]:
        keys["num_classes"] = shown["labels"] - bool(hidden.get("null_class"))
    return {**hidden, **keys}


def _shown_by_known(model: KnownModel) -> dict[str, Any]:
    keys = model.keys
    sizes = [int(size) for size in keys["attention_resolutions"].split(",")]
    levels = range(len(keys["channel_mult"].split(",")))
    shown = ("num_channels", "num_res_blocks", "channel_mult", "use_scale_shift_norm", "resblock_updown")
    return {name: keys[name] for name in (*shown, "learn_sigma")} | {
        "channels": 3,
        "labels": keys.get("num_classes", 0),
        "attention_levels": tuple(level for level in levels if keys["image_size"] >> level in sizes),
    }
