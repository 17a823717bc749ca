"""diffusers' UNet2DModel as a network to distil from and to: `architecture: diffusers_unet2d`."""

from contextlib import ExitStack
from typing import Any

import torch as th
from torch import nn

from ..config.adm_diffusers import conventions
from ..config.architectures import UNet2DArchitecture
from .base import DenoisingNetwork, Evaluation, ForDiffusers
from .diffusers_models import Attention, ResnetBlock2D, UNet2DModel, adopt, attention_heads
from .weight_selection import UNet2DWeights


class DiffusersUNet2D(DenoisingNetwork):
    """A UNet2DModel; parameters have diffusers' names.

    The forward pass is diffusers' own, so what it computes is theirs to the last bit. The timestep
    embedding is taken, and `emb_shift` added to it, where it leaves `time_embedding`, before a class
    embedding is added; the features are what enters `conv_norm_out`, the bottleneck what leaves
    `mid_block`.

    Args:
        config: the UNet2DModel's arguments.
        null_class: whether the last of its labels is the null class.
        class_dropout_prob: see `DenoisingNetwork`.
    """

    Settings = UNet2DArchitecture
    block_types = (ResnetBlock2D, Attention)
    has_maps = True
    model: Any

    def __init__(self, config: dict[str, Any], *, null_class: bool = False, class_dropout_prob: float = 0.0):
        super().__init__()
        adopt(self, UNet2DModel, config)
        self.config = config
        self.capturable = type(self) is DiffusersUNet2D
        size, widths = config["sample_size"], config["block_out_channels"]
        labels, self.class_dropout_prob = config["num_class_embeds"], class_dropout_prob
        self.num_classes = None if labels is None else labels - null_class
        self.shape = (config["in_channels"], size, size)
        self.emb_dim = self.model.time_embedding.linear_2.out_features
        self.feature_shape = (widths[0], size, size)

    @classmethod
    def from_settings(
        cls, settings: UNet2DArchitecture, shape: tuple[int, int, int], out_channels: int
    ) -> "DiffusersUNet2D":
        """Build it, initialised as diffusers does; see `DenoisingNetwork.from_settings`."""
        levels = len(settings.block_out_channels.split(","))
        if shape[1] % 2 ** (levels - 1):
            raise ValueError(f"image_size {shape[1]} cannot be halved {levels - 1} times")
        if "Skip" in settings.down_block_types + settings.up_block_types and out_channels != shape[0]:
            raise ValueError(
                "blocks with Skip add to x itself, so they know no learned variance (learn_sigma)"
            )
        return cls(
            settings.config(shape[0], out_channels),
            null_class=settings.has_null_class,
            class_dropout_prob=settings.class_dropout_prob,
        )

    def evaluate(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        emb_shift: th.Tensor | None = None,
    ) -> Evaluation:
        """Apply the network; see `DenoisingNetwork.evaluate`."""
        y = self.labels(y)
        seen: dict[str, th.Tensor] = {}

        def embed(module: nn.Module, args: tuple, _: th.Tensor) -> th.Tensor:
            with th.autocast(x.device.type, enabled=False):  # in float32, whatever the maps are in
                seen["emb"] = module.forward(args[0])
            return seen["emb"] if emb_shift is None else seen["emb"] + emb_shift

        def keep(_: nn.Module, args: tuple) -> None:
            seen["features"] = args[0].float()

        def keep_middle(_: nn.Module, args: tuple, out: th.Tensor) -> None:
            seen["bottleneck"] = out.float()

        with ExitStack() as stack:
            stack.enter_context(self.model.time_embedding.register_forward_hook(embed))
            stack.enter_context(self.model.conv_norm_out.register_forward_pre_hook(keep))
            if self.model.mid_block is not None:
                stack.enter_context(self.model.mid_block.register_forward_hook(keep_middle))
            stack.enter_context(self.autocast(x))
            output = self.model(x, timesteps, class_labels=y).sample
        return Evaluation(output.float(), seen["features"], seen["emb"], seen.get("bottleneck"))

    def heavy_parts(self) -> list[nn.Module]:
        """All blocks and the output."""
        model = self.model
        parts = (model.down_blocks, model.mid_block, model.up_blocks, model.conv_out)
        return [part for part in parts if part is not None]

    def selectable_weights(self) -> UNet2DWeights:
        """The weights under diffusers' own names, unchanged."""
        groups = self.config["norm_num_groups"]
        return UNet2DWeights(self.state_dict(), attention_heads(self), groups, conventions(self.config))

    def for_diffusers(self) -> ForDiffusers:
        """The configuration, which is diffusers' already."""
        return ForDiffusers("UNet2DModel", self.config, self.state_dict())
