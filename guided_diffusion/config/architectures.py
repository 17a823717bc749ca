"""Configuration keys of diffusers' networks, under diffusers' names and with its defaults.

What a folder's config.json says beside these follows from the rest of a configuration: `sample_size` is
`image_size`, `in_channels` and `out_channels` come from the space and `learn_sigma`, the number of classes
from `num_classes` if `class_cond`. What is null there is 0 or '' here. Imports no torch.
"""

from dataclasses import dataclass
from typing import Any

from .settings import (
    Architecture,
    Process,
    key,
    require,
    require_not_negative,
    require_one_of,
    require_positive,
)

DOWN_BLOCKS = (
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("SkipDownBlock2D", "AttnSkipDownBlock2D"),
)
UP_BLOCKS = tuple(name.replace("Down", "Up", 1).replace("downsample", "upsample") for name in DOWN_BLOCKS)

ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")


@dataclass
class UNet2DArchitecture(Architecture):
    """diffusers' UNet2DModel."""

    block_out_channels: str = key("224,448,672,896", "width of each level")
    down_block_types: str = key("DownBlock2D,AttnDownBlock2D,AttnDownBlock2D,AttnDownBlock2D", "way down")
    mid_block_type: str = key("UNetMidBlock2D", "UNetMidBlock2D, or '' for none")
    up_block_types: str = key("AttnUpBlock2D,AttnUpBlock2D,AttnUpBlock2D,UpBlock2D", "way up")
    layers_per_block: int = key(2, "residual blocks per level (one more on the way up)")
    attention_head_dim: int = key(8, "width of an attention head (0: one head of the full width)")
    add_attention: bool = key(True, "attention in the middle")
    norm_num_groups: int = key(32, "groups of the normalisations")
    attn_norm_num_groups: int = key(
        0, "groups of the middle attention's (0: as the others, none with scale_shift)"
    )
    norm_eps: float = key(1e-5, "epsilon of the normalisations")
    resnet_time_scale_shift: str = key("default", "condition by addition (default) or scale_shift")
    downsample_type: str = key("conv", "halve after attention by conv or resnet")
    upsample_type: str = key("conv", "double after attention by conv or resnet")
    downsample_padding: int = key(1, "padding of halving convolutions (0: on the right and below only)")
    mid_block_scale_factor: float = key(1.0, "the middle block's output is divided by this")
    time_embedding_type: str = key("positional", "positional or learned")
    time_embedding_dim: int = key(0, "width of the timestep embedding (0: 4 times the first level's)")
    num_train_timesteps: int = key(0, "timesteps of a learned embedding")
    flip_sin_to_cos: bool = key(True, "cosines before sines in the timestep embedding")
    freq_shift: float = key(0.0, "shift of the timestep embedding's frequencies")
    center_input_sample: bool = key(False, "map the input from [0, 1] to [-1, 1] first")
    act_fn: str = key("silu", "activation function")
    dropout: float = key(0.0, "dropout probability in training", idle_in=("teacher",))

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        levels = split(self.block_out_channels)
        require(
            bool(levels) and all(width.isdigit() and int(width) > 0 for width in levels),
            f"{where}block_out_channels must be widths such as '64,128', not '{self.block_out_channels}'",
        )
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            blocks = split(getattr(self, name))
            require(
                len(blocks) == len(levels),
                f"{where}{name} must be {len(levels)}, as {where}block_out_channels, not {len(blocks)}",
            )
            for block in blocks:
                require_one_of(block, known, f"each of {where}{name}")
        require_one_of(self.mid_block_type, ("UNetMidBlock2D", ""), f"{where}mid_block_type")
        require_one_of(self.time_embedding_type, ("positional", "learned"), f"{where}time_embedding_type")
        require_one_of(
            self.resnet_time_scale_shift, ("default", "scale_shift"), f"{where}resnet_time_scale_shift"
        )
        require_one_of(self.act_fn, ("silu", "swish", "mish", "gelu", "relu"), f"{where}act_fn")
        for name in ("downsample_type", "upsample_type"):
            require_one_of(getattr(self, name), ("conv", "resnet"), f"{where}{name}")
        require(
            self.time_embedding_type == "positional" or self.num_train_timesteps > 0,
            f"{where}num_train_timesteps: a learned timestep embedding needs their number",
        )
        require_positive(
            self, where, "layers_per_block", "norm_num_groups", "norm_eps", "mid_block_scale_factor"
        )
        require_not_negative(self, where, "attention_head_dim", "attn_norm_num_groups", "time_embedding_dim")
        require(self.downsample_padding in (0, 1), f"{where}downsample_padding must be 0 or 1")
        require(0 <= self.dropout < 1, f"{where}dropout must be in [0, 1), not {self.dropout}")

    def require_timesteps(self, process: Process, where: str) -> None:
        """Raise `UserError` for timesteps that a learned embedding has no rows for."""
        if self.time_embedding_type == "learned":
            require(
                process.diffusion_steps <= self.num_train_timesteps,
                f"{where}num_train_timesteps: the learned timestep embedding has {self.num_train_timesteps} "
                f"rows, {where}diffusion_steps is {process.diffusion_steps}",
            )
            require(
                not process.rescale_timesteps,
                f"{where}rescale_timesteps: a learned timestep embedding takes whole timesteps alone",
            )

    def config(self, channels: int, out_channels: int) -> dict[str, Any]:
        """The arguments of diffusers' UNet2DModel: what stands in its config.json.

        Args:
            channels: of the samples.
            out_channels: of the output.
        """
        return own_keys(self) | {
            "sample_size": self.image_size,
            "in_channels": channels,
            "out_channels": out_channels,
            "block_out_channels": [int(width) for width in split(self.block_out_channels)],
            "down_block_types": split(self.down_block_types),
            "up_block_types": split(self.up_block_types),
            "num_class_embeds": self.num_classes + self.null_class if self.class_cond else None,
            **{
                name: getattr(self, name) or None
                for name in (
                    *("mid_block_type", "attention_head_dim", "attn_norm_num_groups"),
                    *("time_embedding_dim", "num_train_timesteps"),
                )
            },
        }


@dataclass
class DiTArchitecture(Architecture):
    """diffusers' DiTTransformer2DModel."""

    null_class: bool = key(True, "the label num_classes means no class: a dit always has it")
    num_attention_heads: int = key(16, "attention heads")
    attention_head_dim: int = key(72, "width of an attention head")
    num_layers: int = key(28, "transformer blocks")
    patch_size: int = key(2, "height and width of a patch, which is one token")
    attention_bias: bool = key(True, "biases in the attention's projections")
    activation_fn: str = key("gelu-approximate", "activation function")
    upcast_attention: bool = key(False, "attention weights in float32")
    norm_elementwise_affine: bool = key(False, "weights in the second normalisation of each block")
    norm_eps: float = key(1e-5, "epsilon of that normalisation")
    dropout: float = key(0.0, "dropout probability in training", idle_in=("teacher",))

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        require(self.null_class, f"{where}null_class: a dit always has one; leave it out")
        sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size")
        require_positive(self, where, *sizes, "norm_eps")
        require(
            self.image_size % self.patch_size == 0,
            f"{where}patch_size {self.patch_size} does not divide {where}image_size {self.image_size}",
        )
        require_one_of(self.activation_fn, ACTIVATIONS, f"{where}activation_fn")
        require(0 <= self.dropout < 1, f"{where}dropout must be in [0, 1), not {self.dropout}")

    def config(self, channels: int, out_channels: int) -> dict[str, Any]:
        """The arguments of diffusers' DiTTransformer2DModel: what stands in its config.json.

        A transformer without classes is one with a single class.

        Args:
            channels: of the samples.
            out_channels: of the output.
        """
        return own_keys(self) | {
            "sample_size": self.image_size,
            "in_channels": channels,
            "out_channels": out_channels,
            "num_embeds_ada_norm": self.num_classes if self.class_cond else 1,
        }


def split(names: str) -> list[str]:
    """The parts of "a,b,c"."""
    return [part.strip() for part in names.split(",") if part.strip()]


def own_keys(settings: Architecture) -> dict[str, Any]:
    """The keys and values that an architecture has beside those of every one."""
    return {name: value for name, value in vars(settings).items() if name not in vars(Architecture())}
