"""A smaller U-Net's first weights, selected from a larger one's.

"Initializing Models with Larger Ones" (Xu et al., 2024): of each level some blocks are taken, of each
dimension of a weight evenly spaced entries, the same ones wherever a map is written and read. Channels that
are normalised together stay together where the smaller network has such groups. What sums over fewer inputs
than before is scaled, so that its outputs keep their size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch as th

_TABLES = ("class_embedding.", "time_proj.")  # of rows that are looked up, and sum over nothing
_RESNET = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")


@dataclass(frozen=True)
class UNet2DWeights:
    """The weights of a U-Net of ADM's kind.

    Attributes:
        state: under the names of diffusers' UNet2DModel.
        heads: how many each attention has, by its name there.
        groups: of every normalisation.
    """

    state: Mapping[str, th.Tensor]
    heads: Mapping[str, int]
    groups: int

    @property
    def levels(self) -> int:
        """How many resolutions it has."""
        return len({name.split(".")[1] for name in self.state if name.startswith("down_blocks.")})

    def blocks(self, side: str, level: str) -> int:
        """Residual blocks of a level on the way "down" or "up"."""
        prefix = f"{side}_blocks.{level}.resnets."
        return len(
            {name.removeprefix(prefix).partition(".")[0] for name in self.state if name.startswith(prefix)}
        )

    def parts(self, name: str) -> list[list[int]]:
        """What each dimension of an entry is made of: sizes of maps that were joined, of heads, and so on."""
        module, _, kind = name.rpartition(".")
        shape = list(self.state[name].shape)
        parts = [[size] for size in shape]
        block, _, layer = module.rpartition(".")
        last = min(1, len(shape) - 1)  # the inputs of a weight; a normalisation has them alone
        if module == "time_embedding.linear_1" and kind == "weight":
            parts[1] = [1] * shape[1]  # frequencies
        elif module == "conv_out":
            channels = self.state["conv_in.weight"].shape[1]
            parts[0] = [channels] * (shape[0] // channels)  # mean, variance
        elif layer == "time_emb_proj":
            width = self.state[f"{block}.norm2.bias"].shape[0]
            parts[0] = [width] * (shape[0] // width)  # scale, shift
        elif layer in ("to_q", "to_k", "to_v"):
            heads = self.heads[block]
            parts[0] = [shape[0] // heads] * heads
        elif module.endswith(".to_out.0") and kind == "weight":
            heads = self.heads[module.removesuffix(".to_out.0")]
            parts[1] = [shape[1] // heads] * heads
        elif (
            block.startswith("up_blocks.")
            and ".resnets." in block
            and (layer == "norm1" or (layer in ("conv1", "conv_shortcut") and kind == "weight"))
        ):
            before = f"{self._before(block)}.conv2.bias"
            if before not in self.state:
                raise ValueError(f"it has no {before}")
            below = self.state[before].shape[0]
            parts[last] = [below, shape[last] - below]  # the map from below, and the one from the way down
        return parts

    def _before(self, block: str) -> str:
        """The residual block before one on the way up."""
        _, level, _, number = block.split(".")
        if int(number):
            return f"up_blocks.{level}.resnets.{int(number) - 1}"
        return f"up_blocks.{int(level) - 1}.resnets.0" if int(level) else "mid_block.resnets.1"


def selected(larger: UNet2DWeights, smaller: UNet2DWeights) -> dict[str, th.Tensor]:
    """The smaller network's first weights.

    Args:
        larger: what they are selected from.
        smaller: what they are for; its names and shapes count.

    Returns:
        Every entry of `smaller`, of the same shape.

    Raises:
        ValueError: the networks differ in levels, or an entry has no counterpart or a smaller one.
    """
    _require_equal_levels(larger, smaller)
    result = {}
    for name, own in smaller.state.items():
        source = _counterpart(name, larger, smaller)
        if source not in larger.state:
            raise ValueError(f"the larger network has no {source} for {name}")
        value = larger.state[source].float()
        for dim, (theirs, ours) in enumerate(zip(larger.parts(source), smaller.parts(name), strict=True)):
            index = (
                None
                if _is_other_kind(name, theirs, ours)
                else _spread(theirs, ours, larger.groups, smaller.groups)
            )
            if index is None:
                shape = tuple(larger.state[source].shape)
                raise ValueError(f"{source} {shape} does not cover {name} {tuple(own.shape)}")
            value = value.index_select(dim, index)
        if own.ndim > 1 and not name.startswith(_TABLES):
            value = value * (larger.state[source].shape[1] / own.shape[1]) ** 0.5
        result[name] = value
    return result


def bottleneck_channels(larger: UNet2DWeights, smaller: UNet2DWeights) -> th.Tensor:
    """Which of the larger network's channels in the bottleneck the smaller one's are, int64 [C].

    Raises:
        ValueError: the networks differ in levels, one has no bottleneck, or the smaller has more channels.
    """
    _require_equal_levels(larger, smaller)
    name = "mid_block.resnets.1.conv2.bias"
    if not (name in larger.state and name in smaller.state):
        raise ValueError("one of them has no middle block")
    (theirs,), (ours,) = larger.parts(name), smaller.parts(name)
    index = _spread(theirs, ours, larger.groups, smaller.groups)
    if index is None:
        raise ValueError(f"the bottleneck's {sum(theirs)} channels do not cover {sum(ours)}")
    return index


def _require_equal_levels(larger: UNet2DWeights, smaller: UNet2DWeights) -> None:
    if larger.levels != smaller.levels:
        raise ValueError(f"the larger network has {larger.levels} levels, the smaller {smaller.levels}")


def _counterpart(name: str, larger: UNet2DWeights, smaller: UNet2DWeights) -> str:
    """The larger network's entry for one of the smaller's; blocks that read one another stay together."""
    found = _RESNET.match(name)
    if found is None:
        return name
    side, level, kind, number = *found.groups()[:3], int(found[4])
    more = larger.blocks(side, level) - smaller.blocks(side, level)
    if more < 0:
        raise ValueError(f"the larger network has fewer blocks in {side}_blocks.{level}")
    moved = number > 0 and (side == "up" or number == smaller.blocks(side, level) - 1)
    return f"{side}_blocks.{level}.{kind}.{number + moved * more}.{name[found.end() :]}"


def _is_other_kind(name: str, theirs: list[int], ours: list[int]) -> bool:
    """Whether one network scales and shifts by its conditions, and the other adds them."""
    return ".time_emb_proj." in name and len(theirs) != len(ours)


def _spread(theirs: list[int], ours: list[int], their_groups: int, our_groups: int) -> th.Tensor | None:
    """Indices of evenly spaced entries of evenly spaced parts; None if there are too few."""
    starts, parts = [0, *accumulate(theirs)], [k * len(theirs) // len(ours) for k in range(len(ours))]
    pairs = [(theirs[part], size) for part, size in zip(parts, ours, strict=True)]
    if len(theirs) < len(ours) or any(their_size < size for their_size, size in pairs):
        return None
    chosen = [_entries(*pair, their_groups, our_groups) for pair in pairs]
    return th.cat([starts[part] + entries for part, entries in zip(parts, chosen, strict=True)])


def _entries(their_size: int, size: int, their_groups: int, our_groups: int) -> th.Tensor:
    """Indices of evenly spaced entries, or of evenly spaced groups if ours are no larger than theirs."""
    evenly = th.arange(size) * their_size // size
    if their_size % their_groups or size % our_groups or their_groups < our_groups:
        return evenly
    theirs, ours = their_size // their_groups, size // our_groups
    if theirs < ours:
        return evenly
    first = th.arange(our_groups) * their_groups // our_groups * theirs
    return (first[:, None] + th.arange(ours) * theirs // ours).flatten()
