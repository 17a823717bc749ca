"""A smaller network's initial weights, selected from a larger one's of the same kind.

"Initializing Models with Larger Ones" (Xu et al., 2024): of each level of a U-Net some blocks are taken, of a
transformer the first ones, and of each dimension of a weight evenly spaced entries, the same ones wherever a
map is written and read. Channels that are normalised together stay together where the smaller network has
such groups. What sums over fewer inputs than before is scaled, so that its outputs keep their size.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch as th

# Of rows that are looked up, and sum over nothing.
_TABLES = ("class_embedding", "time_proj", "class_embedder.embedding_table")
_RESNET = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")


@dataclass(frozen=True)
class SelectableWeights(ABC):
    """A network's weights, and what is to be known of them to select some.

    Attributes:
        state: by their names.
        heads: how many each attention has, by its name.
        groups: of every normalisation.
        conventions: how the network reads its weights, where others of its kind read the same ones otherwise.
        output: name of the last layer.
    """

    state: Mapping[str, th.Tensor]
    heads: Mapping[str, int]
    groups: int
    conventions: Mapping[str, Any] = field(default_factory=dict)
    output: ClassVar[str]

    @abstractmethod
    def parts(self, name: str) -> list[list[int]]:
        """What each dimension of an entry is made of: sizes of maps that were joined, of heads, and so on."""

    @abstractmethod
    def mean_rows(self) -> th.Tensor:
        """Which rows of the last layer give the prediction, not its variance, bool [rows]."""

    def require_alike(self, smaller: "SelectableWeights") -> None:
        """Raise `ValueError` if the smaller network's weights cannot be some of these."""
        if type(smaller) is not type(self):
            raise ValueError("the two networks are of different kinds")

    def require_same_conventions(self, smaller: "SelectableWeights") -> None:
        """Raise `ValueError` if the smaller network would read these weights otherwise."""
        for name, value in self.conventions.items():
            if value != smaller.conventions[name]:
                raise ValueError(
                    f"the larger network's {name} is {value}, the smaller's {smaller.conventions[name]}"
                )

    def counterpart(self, name: str, smaller: "SelectableWeights") -> str:
        """The entry here that one of the smaller network's is selected from.

        Raises:
            ValueError: there cannot be one.
        """
        return name

    def _attention_parts(self, name: str) -> list[list[int]]:
        """Each dimension as one part, but for those of an attention that are made of its heads."""
        module, _, kind = name.rpartition(".")
        parts = [[size] for size in self.state[name].shape]
        block, _, layer = module.rpartition(".")
        if layer in ("to_q", "to_k", "to_v"):
            parts[0] = _equal_parts(parts[0][0], self.heads[block])
        elif module.endswith(".to_out.0") and kind == "weight":
            parts[1] = _equal_parts(parts[1][0], self.heads[module.removesuffix(".to_out.0")])
        return parts


class UNet2DWeights(SelectableWeights):
    """The weights of a U-Net of ADM's kind, under the names of diffusers' UNet2DModel."""

    output = "conv_out"

    def parts(self, name: str) -> list[list[int]]:
        """What each dimension of an entry is made of; see `SelectableWeights.parts`."""
        module, _, kind = name.rpartition(".")
        shape = list(self.state[name].shape)
        parts = self._attention_parts(name)
        block, _, layer = module.rpartition(".")
        last = min(1, len(shape) - 1)  # the inputs of a weight; a normalisation has them alone
        if (module == "time_embedding.linear_1" and kind == "weight") or module == "time_proj":
            parts[1] = [1] * shape[1]  # frequencies
        elif module == self.output:
            channels = self.state["conv_in.weight"].shape[1]
            parts[0] = [channels] * (shape[0] // channels)  # mean, variance
        elif layer == "time_emb_proj":
            width = self.state[f"{block}.norm2.bias"].shape[0]
            parts[0] = [width] * (shape[0] // width)  # scale, shift
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

    def mean_rows(self) -> th.Tensor:
        """Which rows of the last layer give the prediction, bool [rows]."""
        return th.arange(len(self.state["conv_out.bias"])) < self.state["conv_in.weight"].shape[1]

    def require_alike(self, smaller: SelectableWeights) -> None:
        """Raise `ValueError` for other networks, and for U-Nets of other levels."""
        super().require_alike(smaller)
        theirs, ours = (_count_parts(weights.state, "down_blocks.") for weights in (self, smaller))
        if theirs != ours:
            raise ValueError(f"the larger network has {theirs} levels, the smaller {ours}")

    def counterpart(self, name: str, smaller: SelectableWeights) -> str:
        """The entry here for one of the smaller's; blocks that read one another's maps stay together."""
        found = _RESNET.match(name)
        if found is None:
            return name
        side, level, kind, number = *found.groups()[:3], int(found[4])
        prefix = f"{side}_blocks.{level}.resnets."
        theirs, ours = (_count_parts(weights.state, prefix) for weights in (self, smaller))
        if theirs < ours:
            raise ValueError(f"the larger network has fewer blocks in {side}_blocks.{level}")
        moved = number > 0 and (side == "up" or number == ours - 1)
        source = f"{side}_blocks.{level}.{kind}.{number + moved * (theirs - ours)}."
        layer = name[found.end() :]
        shortcut = "conv_shortcut.weight"
        theirs_changes, ours_changes = source + shortcut in self.state, found[0] + shortcut in smaller.state
        if layer == "conv1.weight" and theirs_changes and not ours_changes:
            raise ValueError(f"{source[:-1]} changes the number of channels, {found[0][:-1]} does not")
        return source + layer

    def _before(self, block: str) -> str:
        """The residual block before one on the way up."""
        _, level, _, number = block.split(".")
        if int(number):
            return f"up_blocks.{level}.resnets.{int(number) - 1}"
        return f"up_blocks.{int(level) - 1}.resnets.0" if int(level) else "mid_block.resnets.1"


def selected(larger: SelectableWeights, smaller: SelectableWeights) -> dict[str, th.Tensor]:
    """The smaller network's initial weights.

    Args:
        larger: what they are selected from.
        smaller: what they are for; its names and shapes count.

    Returns:
        Every entry of `smaller`, of the same shape.

    Raises:
        ValueError: the networks differ in kind, levels or conventions, or an entry has no counterpart or a
            smaller one.
    """
    larger.require_alike(smaller)
    larger.require_same_conventions(smaller)
    result = {}
    for name, own in smaller.state.items():
        source = larger.counterpart(name, smaller)
        if source not in larger.state:
            raise ValueError(
                f"the larger network has no {source}: fewer blocks, or attention or resampling otherwise"
            )
        value = larger.state[source].float()
        for dim, (theirs, ours) in enumerate(zip(larger.parts(source), smaller.parts(name), strict=True)):
            if _is_other_kind(name, theirs, ours):
                raise ValueError("one of them has use_scale_shift_norm, the other has not")
            if len(theirs) < len(ours):
                raise ValueError(f"{source} has {len(theirs)} parts, such as heads, and {name} {len(ours)}")
            index = _spread(theirs, ours, larger.groups, smaller.groups)
            if index is None:
                shape = tuple(larger.state[source].shape)
                raise ValueError(f"{source} {shape} does not cover {name} {tuple(own.shape)}")
            value = value.index_select(dim, index)
        if own.ndim > 1 and not name.rpartition(".")[0].endswith(_TABLES):
            value = value * (larger.state[source].shape[1] / own.shape[1]) ** 0.5
        result[name] = value
    return result


def bottleneck_channels(larger: SelectableWeights, smaller: SelectableWeights) -> th.Tensor:
    """Which of the larger network's channels in the bottleneck the smaller one's are, int64 [C].

    Raises:
        ValueError: the networks differ in kind or levels, one has no bottleneck, or the smaller has more
            channels.
    """
    larger.require_alike(smaller)
    name = "mid_block.resnets.1.conv2.bias"
    if not (name in larger.state and name in smaller.state):
        raise ValueError("one of them has no middle block")
    (theirs,), (ours,) = larger.parts(name), smaller.parts(name)
    index = _spread(theirs, ours, larger.groups, smaller.groups)
    if index is None:
        raise ValueError(f"the bottleneck's {sum(theirs)} channels do not cover {sum(ours)}")
    return index


def _count_parts(state: Mapping[str, th.Tensor], prefix: str) -> int:
    """How many numbers follow a prefix in the names: the length of a list of modules."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})


def _equal_parts(size: int, count: int) -> list[int]:
    return [size // count] * count


def _is_other_kind(name: str, theirs: list[int], ours: list[int]) -> bool:
    """Whether one network scales and shifts by its conditions, and the other adds them."""
    return ".time_emb_proj." in name and len(theirs) != len(ours)


def _spread(theirs: list[int], ours: list[int], their_groups: int, our_groups: int) -> th.Tensor | None:
    """Indices of evenly spaced entries of evenly spaced parts; None if a part has too few entries."""
    starts, parts = [0, *accumulate(theirs)], [k * len(theirs) // len(ours) for k in range(len(ours))]
    pairs = [(theirs[part], size) for part, size in zip(parts, ours, strict=True)]
    if any(their_size < size for their_size, size in pairs):
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
