"""The weights of ADM's U-Net under diffusers' names, and back, bit for bit.

diffusers keeps one matrix each for queries, keys and values, in the order of ADM's new attention; ADM packs
them into one. Everything else has another name alone, and 1-d convolutions are linear layers there.
"""

from collections.abc import Iterator, Mapping

import torch as th
from torch import nn

from .blocks import AttentionBlock

_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def diffusers_state(network: nn.Module, num_res_blocks: int) -> dict[str, th.Tensor]:
    """The weights of an ADM U-Net as those of a UNet2DModel.

    Args:
        network: the U-Net.
        num_res_blocks: residual blocks per level.
    """
    own, attentions = network.state_dict(), attention_blocks(network)
    state: dict[str, th.Tensor] = {}
    for name, prefix, their_name in _names(own, num_res_blocks):
        value = own[name]
        if prefix in attentions and ".qkv." in name:
            parts = _unpacked(value, attentions[prefix])
            state |= {their_name.replace("qkv", f"to_{part}"): parts[i] for i, part in enumerate("qkv")}
        else:
            state[their_name] = value.squeeze(-1) if value.ndim == 3 else value
    return state


def adm_state(
    network: nn.Module, state: Mapping[str, th.Tensor], num_res_blocks: int
) -> dict[str, th.Tensor]:
    """The weights of a UNet2DModel as those of an ADM U-Net.

    Args:
        network: the U-Net.
        state: the UNet2DModel's.
        num_res_blocks: residual blocks per level.

    Returns:
        What was found, under ADM's names; what belongs nowhere under its own.
    """
    own, attentions = network.state_dict(), attention_blocks(network)
    rest, result = dict(state), {}
    for name, prefix, their_name in _names(own, num_res_blocks):
        packed = prefix in attentions and ".qkv." in name
        names = [their_name.replace("qkv", f"to_{part}") for part in "qkv"] if packed else [their_name]
        if any(other not in rest for other in names):
            continue
        values = [rest.pop(other) for other in names]
        value = values[0]
        if packed and len({part.shape for part in values}) == 1:
            value = _packed(th.stack(values), attentions[prefix])
        result[name] = value[..., None] if own[name].ndim == 3 and value.ndim == 2 else value
    return result | rest


def attention_blocks(network: nn.Module) -> dict[str, AttentionBlock]:
    """Every attention of a network, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, AttentionBlock)}


def attention_heads(network: nn.Module, num_res_blocks: int) -> dict[str, int]:
    """How many heads each attention has, by its name in a UNet2DModel."""
    attentions, suffix = attention_blocks(network), ".qkv.weight"
    return {
        their_name.removesuffix(suffix): attentions[prefix].num_heads
        for name, prefix, their_name in _names(network.state_dict(), num_res_blocks)
        if name.endswith(suffix)
    }


def _unpacked(value: th.Tensor, block: AttentionBlock) -> th.Tensor:
    """[3C, ...] -> (q, k, v), [3, C, ...]; a weight's trailing 1 goes."""
    value = value.squeeze(-1) if value.ndim == 3 else value
    if block.new_order:
        return value.unflatten(0, (3, -1))
    return value.unflatten(0, (block.num_heads, 3, -1)).transpose(0, 1).flatten(1, 2).contiguous()


def _packed(parts: th.Tensor, block: AttentionBlock) -> th.Tensor:
    """The inverse of `_unpacked`, but for the trailing 1."""
    if block.new_order or parts.shape[1] % block.num_heads:
        return parts.flatten(0, 1)
    return parts.unflatten(1, (block.num_heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _names(own: Mapping[str, th.Tensor], num_res_blocks: int) -> Iterator[tuple[str, str, str]]:
    """(name, the block it is in, diffusers' name, in which qkv still stands) of every entry."""
    for name in own:
        module, _, kind = name.rpartition(".")
        if module in _FIXED:
            yield name, module, f"{_FIXED[module]}.{kind}"
            continue
        area, *numbers = name.split(".")[:3]
        if area == "middle_block":
            prefix = f"{area}.{numbers[0]}"
            block = f"mid_block.{_MIDDLE[numbers[0]]}"
        else:
            prefix = ".".join([area, *numbers])
            block = _block(
                area, int(numbers[0]), int(numbers[1]), f"{prefix}.qkv.weight" in own, num_res_blocks
            )
        part = module.removeprefix(f"{prefix}.")
        yield name, prefix, f"{block}.{_PARTS.get(part, part)}.{kind}"


def _block(area: str, index: int, part: int, is_attention: bool, num_res_blocks: int) -> str:
    """diffusers' name of part `part` of ADM's block `index` on the way down or up."""
    down = area == "input_blocks"
    level, block = divmod(index - 1 if down else index, num_res_blocks + 1)
    side = f"{'down' if down else 'up'}_blocks.{level}"
    if is_attention:
        return f"{side}.attentions.{block}"
    if down and block == num_res_blocks:
        return f"{side}.downsamplers.0"
    return f"{side}.upsamplers.0" if part else f"{side}.resnets.{block}"
