"""The ADM U-Net: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021), section 3.

Names and shapes of the parameters are those of the public ADM checkpoints, which load strictly. The
network knows nothing of noise schedules, and nothing of distillation beyond handing out the features
and the timestep embedding that a training-time head may read.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch as th
from torch import nn

from .config.adm_diffusers import ADM_CONVENTIONS, group_count, unet2d_config
from .config.settings import AdmArchitecture
from .networks.adm_weights import adm_state, attention_blocks, attention_heads, diffusers_state
from .networks.base import DenoisingNetwork, Evaluation, ForDiffusers
from .networks.blocks import AttentionBlock, Downsample, ResBlock, TimestepSequential, Upsample
from .networks.weight_selection import UNet2DWeights
from .nn import GroupNorm32, timestep_embedding, zero_module

_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


class UNetModel(DenoisingNetwork):
    """The full U-Net with attention and timestep embedding.

    Args:
        image_size: H = W of the samples.
        in_channels: C of the samples.
        model_channels: base width; level i has width `channel_mult[i] * model_channels`.
        out_channels: C, or 2C when the variance is learned.
        num_res_blocks: residual blocks per level (one more on the way up).
        attention_resolutions: downsampling rates, not pixel sizes, at which attention is used.
        dropout: dropout probability in [0, 1).
        channel_mult: width multiplier of each level.
        num_classes: makes the model class-conditional with that many classes.
        null_class: a label more, `num_classes`, means no class.
        class_dropout_prob: probability that a label is replaced by that one in training.
        use_checkpoint: recompute blocks in backward to save memory.
        num_heads: heads of each attention, unless `num_head_channels` > 0 gives their width.
        num_head_channels: width of each head; -1 to go by `num_heads`.
        num_heads_upsample: heads on the way up; -1 for `num_heads`.
        use_scale_shift_norm: condition by scale and shift (FiLM) instead of addition.
        resblock_updown: resample inside residual blocks instead of by convolutions.
        use_new_attention_order: see `AttentionBlock`.

    Convolutions and attentions run in `compute_dtype` (autocast); the parameters, the normalisations and the
    timestep embedding stay float32.
    """

    Settings = AdmArchitecture
    block_types = (ResBlock, AttentionBlock)
    has_maps = True

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        null_class: bool = False,
        class_dropout_prob: float = 0.0,
    ):
        super().__init__()
        self.image_size = image_size
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.shape = (in_channels, image_size, image_size)
        self.capturable = type(self) is UNetModel and not use_checkpoint

        self.num_res_blocks, self.resblock_updown = num_res_blocks, resblock_updown
        self.use_scale_shift_norm, self.dropout = use_scale_shift_norm, dropout

        self.widths = widths = [int(mult * model_channels) for mult in channel_mult]
        self.feature_shape = (widths[0], image_size, image_size)
        self.emb_dim = 4 * model_channels
        groups = group_count(*widths)

        def res_block(width_in: int, width_out: int, resample=None) -> ResBlock:
            return ResBlock(
                width_in,
                self.emb_dim,
                dropout,
                width_out,
                groups,
                use_scale_shift_norm,
                use_checkpoint,
                resample,
            )

        def attention(width: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels == -1 else width // num_head_channels
            return AttentionBlock(width, heads, groups, use_new_attention_order, use_checkpoint)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.emb_dim),
            nn.SiLU(),
            nn.Linear(self.emb_dim, self.emb_dim),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + null_class, self.emb_dim)

        width, rate = widths[0], 1
        self.input_blocks = nn.ModuleList([TimestepSequential(nn.Conv2d(in_channels, width, 3, padding=1))])
        skip_widths = [width]
        for level, level_width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(width, level_width)]
                width = level_width
                if rate in attention_resolutions:
                    layers.append(attention(width, num_heads))
                self.input_blocks.append(TimestepSequential(*layers))
                skip_widths.append(width)
            if level < len(widths) - 1:
                down = (
                    res_block(width, width, Downsample)
                    if resblock_updown
                    else Downsample(width, use_conv=True)
                )
                self.input_blocks.append(TimestepSequential(down))
                skip_widths.append(width)
                rate *= 2

        self.middle_block = TimestepSequential(
            res_block(width, width), attention(width, num_heads), res_block(width, width)
        )

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers = [res_block(width + skip_widths.pop(), level_width)]
                width = level_width
                if rate in attention_resolutions:
                    layers.append(attention(width, heads_up))
                if level > 0 and block == num_res_blocks:
                    layers.append(
                        res_block(width, width, Upsample)
                        if resblock_updown
                        else Upsample(width, use_conv=True)
                    )
                    rate //= 2
                self.output_blocks.append(TimestepSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(groups, width),
            nn.SiLU(),
            zero_module(nn.Conv2d(width, out_channels, 3, padding=1)),
        )

    @classmethod
    def from_settings(
        cls, settings: AdmArchitecture, shape: tuple[int, int, int], out_channels: int
    ) -> "UNetModel":
        """Build an ADM U-Net, initialised as ADM's; see `DenoisingNetwork.from_settings`."""
        channels, image_size, _ = shape
        levels = parse_channel_mult(settings.channel_mult, image_size)
        sizes = [int(part) for part in str(settings.attention_resolutions).split(",") if part]
        factors = [image_size // size for size in sizes]  # ADM's rule, whatever the sizes of the levels are
        if image_size % 2 ** (len(levels) - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {len(levels) - 1} times")
        names = ["num_head_channels"]
        if settings.num_head_channels == -1:
            names = ["num_heads", "num_heads_upsample"]
        for level, mult in enumerate(levels):
            width = int(mult * settings.num_channels)
            if width < 1:
                raise ValueError(f"channel_mult {mult} of num_channels {settings.num_channels} is no width")
            has_attention, is_middle = 1 << level in factors, level == len(levels) - 1
            for name in names:
                value = getattr(settings, name)
                used = has_attention or (is_middle and name != "num_heads_upsample")
                asked = value != -1 or name == "num_heads"  # -1: as many as on the way down
                if used and asked and (value <= 0 or width % value):
                    raise ValueError(f"{name} {value} does not divide the attention width {width}")
        same = (
            *("num_res_blocks", "dropout", "use_checkpoint", "num_heads", "num_head_channels"),
            *("num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order"),
            *("null_class", "class_dropout_prob"),
        )
        return cls(
            image_size=image_size,
            in_channels=channels,
            model_channels=settings.num_channels,
            out_channels=out_channels,
            attention_resolutions=factors,
            channel_mult=levels,
            num_classes=settings.num_classes if settings.class_cond else None,
            **{name: getattr(settings, name) for name in same},
        )

    def evaluate(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        emb_shift: th.Tensor | None = None,
    ) -> Evaluation:
        """Apply the network; see `DenoisingNetwork.evaluate`. H and W are multiples of 2^(levels - 1)."""
        y = self.labels(y)
        # fmt: off
        with th.autocast(x.device.type, enabled=False):
            emb = timestep_embedding(timesteps, self.model_channels)
            emb = self.time_embed(emb)                           # (B, D)
        with self.autocast(x):
            condition = emb if emb_shift is None else emb + emb_shift
            if y is not None:
                condition = condition + self.label_emb(y)        # (B, D)
            h, skips = x, []                                     # (B, C, H, W)
            for block in self.input_blocks:
                h = block(h, condition)                          # (B, C_i, H_i, W_i)
                skips.append(h)
            h = self.middle_block(h, condition)                  # (B, C_L, H_L, W_L)
            bottleneck = h.float()
            for block in self.output_blocks:
                h = th.cat([h, skips.pop()], dim=1)
                h = block(h, condition)                          # (B, C_i, H_i, W_i)
            features = h.float()                                 # (B, C_0, H, W)
            norm, _, conv = self.out
            output = conv(norm(features, silu=True)).float()     # (B, C or 2C, H, W)
        # fmt: on
        return Evaluation(output, features, emb, bottleneck)

    def heavy_parts(self) -> Iterable[nn.Module]:
        """All blocks and the output."""
        return (self.input_blocks, self.middle_block, self.output_blocks, self.out)

    def from_diffusers(self, state: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
        """A UNet2DModel's weights under ADM's names."""
        return adm_state(self, state, self.num_res_blocks)

    def selectable_weights(self) -> UNet2DWeights:
        """Its weights under the names of a UNet2DModel."""
        state = diffusers_state(self, self.num_res_blocks)
        heads, groups = attention_heads(self, self.num_res_blocks), group_count(*self.widths)
        return UNet2DWeights(state, heads, groups, ADM_CONVENTIONS)

    def for_diffusers(self) -> ForDiffusers:
        """As a UNet2DModel."""
        levels = range(len(self.widths))
        first_blocks = [self.input_blocks[1 + level * (self.num_res_blocks + 1)] for level in levels]
        config = unet2d_config(
            shape=self.shape,
            out_channels=self.out_channels,
            base_width=self.model_channels,
            widths=self.widths,
            attention=[len(block) > 1 for block in first_blocks],  # type: ignore[arg-type]
            heads=[(a.qkv.in_channels, a.num_heads) for a in attention_blocks(self).values()],
            num_res_blocks=self.num_res_blocks,
            dropout=self.dropout,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resblock_updown=self.resblock_updown,
            labels=None if self.num_classes is None else self.label_emb.num_embeddings,
        )
        return ForDiffusers("UNet2DModel", config, diffusers_state(self, self.num_res_blocks))


def parse_channel_mult(channel_mult: str, image_size: int) -> tuple[float, ...]:
    """Widths per level from "1,2,2"; "" for ADM's choice at this image size.

    Raises:
        ValueError: no numbers, or "" at an image size ADM has no choice for.
    """
    if channel_mult:
        numbers = [float(part) for part in channel_mult.split(",")]
        return tuple(int(n) if n.is_integer() else n for n in numbers)
    if image_size not in _CHANNEL_MULT:
        raise ValueError(f"image_size {image_size} has no default channel_mult; give one such as 1,2,2")
    return _CHANNEL_MULT[image_size]
