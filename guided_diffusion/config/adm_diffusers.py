"""Exact conversion between the configurations of ADM's U-Net and of diffusers' UNet2DModel. Imports no torch.

The names and contents of the weights are `networks.adm_weights`'s.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN_DOWN, _PLAIN_UP = ("DownBlock2D", "ResnetDownsampleBlock2D"), ("UpBlock2D", "ResnetUpsampleBlock2D")
# What every UNet2DModel that is an ADM U-Net has.
_SAME_IN_ALL = {"downsample_padding": 1, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0}
# How an ADM U-Net reads its weights, where a UNet2DModel may read the same ones otherwise.
ADM_CONVENTIONS: dict[str, Any] = {
    **{name: _SAME_IN_ALL[name] for name in ("downsample_padding", "flip_sin_to_cos", "freq_shift")},
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "act_fn": "silu",
}


def conventions(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel's values of the keys of `ADM_CONVENTIONS`, from its arguments."""
    found = {name: config.get(name, usual) for name, usual in ADM_CONVENTIONS.items()}
    return found | {"act_fn": "silu"} if found["act_fn"] == "swish" else found


def group_count(*widths: int) -> int:
    """Groups for every GroupNorm of a network: 32 if that divides all its widths, as in every published one.

    Narrower networks get the largest power of two that leaves at least four channels to a group: with one
    channel to a group the mean of each is normalised away, and digits came out on coloured grounds
    (digits-FD 17 instead of 6 for the demo's student of 16 channels). One count for the whole
    network, rather than one per layer, keeps it expressible as a diffusers `UNet2DModel`.
    """
    common = math.gcd(32, *widths)
    return common if common == 32 else max(1, common // 4)


def adm_keys(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys of the ADM U-Net that computes exactly what a UNet2DModel does; None if there is none.

    Args:
        config: the UNet2DModel's arguments, complete (`UNet2DArchitecture.config`).
    """
    widths, head = config["block_out_channels"], config["attention_head_dim"]
    down, up, last = config["down_block_types"], config["up_block_types"][::-1], len(widths) - 1
    attention = [name == "AttnDownBlock2D" for name in down]
    # A level without attention says by its type how it is halved or doubled, one with attention by a key.
    resnet = {
        config["downsample_type"] == "resnet" if has else name == _PLAIN_DOWN[1]
        for name, has in zip(down[:last], attention, strict=False)
    } | {
        config["upsample_type"] == "resnet" if has else name == _PLAIN_UP[1]
        for name, has in zip(up[1:], attention[1:], strict=True)
    }
    multiples = [width / widths[0] for width in widths]
    attended = [width for width, has in zip(widths, [*attention[:-1], True], strict=True) if has]
    same = {
        "mid_block_type": "UNetMidBlock2D",
        "add_attention": True,
        **_SAME_IN_ALL,
        "norm_num_groups": group_count(*widths),
    }
    expressible = (
        all(config[name] == value for name, value in same.items())
        and conventions(config) == ADM_CONVENTIONS
        and len(resnet) <= 1
        and all(
            (has and name == "AttnUpBlock2D") or (not has and below in _PLAIN_DOWN and name in _PLAIN_UP)
            for below, name, has in zip(down, up, attention, strict=True)
        )
        and config["time_embedding_dim"] in (None, 4 * widths[0])
        # Without a number of its own the middle's attention is normalised only where conditions are added.
        and (config["attn_norm_num_groups"] or config["resnet_time_scale_shift"] == "default")
        and config["attn_norm_num_groups"] in (None, config["norm_num_groups"])
        and all(head is None or width % head == 0 for width in attended)
        and config["sample_size"] % 2**last == 0
        and all(int(m * widths[0]) == width for m, width in zip(multiples, widths, strict=True))
    )
    if not expressible:
        return None
    return {
        "num_channels": widths[0],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": ",".join(str(int(m) if m.is_integer() else m) for m in multiples),
        "attention_resolutions": ",".join(
            str(config["sample_size"] >> level) for level, has in enumerate(attention) if has
        ),
        "num_heads": 1,
        "num_heads_upsample": -1,
        "num_head_channels": head or -1,
        "dropout": config["dropout"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "resblock_updown": resnet == {True},
        "use_new_attention_order": True,
    }


def unet2d_config(
    *,
    shape: tuple[int, int, int],
    out_channels: int,
    base_width: int,
    widths: Sequence[int],
    attention: Sequence[bool],
    heads: Sequence[tuple[int, int]],
    num_res_blocks: int,
    dropout: float,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    labels: int | None,
) -> dict[str, Any]:
    """The arguments of the UNet2DModel that computes exactly what an ADM U-Net does.

    Args:
        shape: (C, H, W) of the samples.
        out_channels: of the output.
        base_width: `num_channels`, the width of the timestep's sinusoids.
        widths: of each level.
        attention: which levels have it.
        heads: (width, number of heads) of every attention.
        num_res_blocks, dropout, use_scale_shift_norm, resblock_updown: its configuration's.
        labels: how many it takes, the null class among them; None without.

    Raises:
        ValueError: there is no such UNet2DModel, and why.
    """
    if widths[0] != base_width:
        raise ValueError(f"its first level is {widths[0]} wide, not num_channels {base_width}")
    head_widths = {width // number for width, number in heads}
    if len(head_widths) > 1 and any(number > 1 for _, number in heads):
        raise ValueError(
            f"its attention heads are {' and '.join(map(str, sorted(head_widths)))} wide, in diffusers all "
            "are of one width (num_head_channels)"
        )
    plain = int(resblock_updown)
    kind = "resnet" if resblock_updown else "conv"
    groups = group_count(*widths)
    return {
        "sample_size": shape[1],
        "in_channels": shape[0],
        "out_channels": out_channels,
        "block_out_channels": list(widths),
        "layers_per_block": num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if has else _PLAIN_DOWN[plain] for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else _PLAIN_UP[plain] for has in reversed(attention)],
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": head_widths.pop() if len(head_widths) == 1 else None,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if use_scale_shift_norm else "default",
        "dropout": dropout,
        "num_class_embeds": labels,
        **_SAME_IN_ALL,
    }
