"""The ADM U-Net: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021), section 3.

Names and shapes of the parameters are those of the public ADM checkpoints, which load strictly. The
network knows nothing of noise schedules, and nothing of distillation beyond handing out the features
and the timestep embedding that a training-time head may read.
"""

from collections.abc import Sequence

import torch as th
from torch import nn

from .networks.blocks import AttentionBlock, Downsample, ResBlock, TimestepSequential, Upsample
from .nn import GroupNorm32, group_count, timestep_embedding, zero_module


class UNetModel(nn.Module):
    """The full U-Net with attention and timestep embedding.

    Args:
        image_size: H = W of the images; kept for those who ask the model for it.
        model_channels: base width; level i has width `channel_mult[i] * model_channels`.
        out_channels: 3, or 6 when the variance is learned.
        num_res_blocks: residual blocks per level (one more on the way up).
        attention_resolutions: downsampling rates, not pixel sizes, at which attention is used.
        dropout: dropout probability in [0, 1).
        channel_mult: width multiplier of each level.
        num_classes: makes the model class-conditional with that many classes.
        use_checkpoint: recompute blocks in backward to save memory.
        num_heads: heads of each attention, unless `num_head_channels` > 0 gives their width.
        num_head_channels: width of each head; -1 to go by `num_heads`.
        num_heads_upsample: heads on the way up; -1 for `num_heads`.
        use_scale_shift_norm: condition by scale and shift (FiLM) instead of addition.
        resblock_updown: resample inside residual blocks instead of by convolutions.
        use_new_attention_order: see `AttentionBlock`.
        in_channels: 3.

    Attributes:
        compute_dtype: dtype in which the convolutions and attentions run (autocast); the parameters,
            the normalisations and the timestep embedding stay float32.
    """

    def __init__(
        self,
        image_size: int,
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
        in_channels: int = 3,
    ):
        super().__init__()
        self.image_size = image_size
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes

        widths = [int(mult * model_channels) for mult in channel_mult]
        self.feature_channels = widths[0]  # of the map that `features` returns
        self.emb_channels = 4 * model_channels
        groups = group_count(*widths)

        def res_block(width_in: int, width_out: int, resample=None) -> ResBlock:
            return ResBlock(
                width_in,
                self.emb_channels,
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
            nn.Linear(model_channels, self.emb_channels),
            nn.SiLU(),
            nn.Linear(self.emb_channels, self.emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)

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
        self.use_dtype(th.float32)

    def embed_timesteps(self, timesteps: th.Tensor) -> th.Tensor:
        """The timestep embedding e: [B] original (not respaced) timesteps -> float32 [B, D]."""
        with th.autocast(timesteps.device.type, enabled=False):
            return self.time_embed(timestep_embedding(timesteps, self.model_channels))

    def features(self, x: th.Tensor, emb: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """Everything but the output layers.

        Args:
            x: [B, 3, H, W], H and W multiples of 2^(levels - 1).
            emb: [B, D], from `embed_timesteps`, possibly with something added.
            y: int64 [B] class labels if and only if the model is class-conditional.

        Returns:
            The last decoder feature map, float32 [B, feature_channels, H, W].

        Raises:
            ValueError: labels given to an unconditional model, or missing from a conditional one.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("give class labels y if and only if the model is class-conditional")
        # fmt: off
        with self._autocast(x):
            if y is not None:
                emb = emb + self.label_emb(y)                    # (B, D)
            h, skips = x, []                                     # (B, 3, H, W)
            for block in self.input_blocks:
                h = block(h, emb)                                # (B, C_i, H_i, W_i)
                skips.append(h)
            h = self.middle_block(h, emb)                        # (B, C_L, H_L, W_L)
            for block in self.output_blocks:
                h = block(th.cat([h, skips.pop()], dim=1), emb)  # (B, C_i, H_i, W_i)
        return h.float()                                         # (B, C_0, H, W)
        # fmt: on

    def predict(self, features: th.Tensor) -> th.Tensor:
        """Output layers: float32 [B, feature_channels, H, W] -> float32 [B, out_channels, H, W]."""
        with self._autocast(features):
            norm, _, conv = self.out
            return conv(norm(features, silu=True)).float()

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """Apply the model.

        Args:
            x: [B, 3, H, W], noisy images.
            timesteps: [B], original (not respaced) timesteps, integer or fractional.
            y: int64 [B] class labels if and only if the model is class-conditional.

        Returns:
            float32 [B, out_channels, H, W].

        Raises:
            ValueError: labels given to an unconditional model, or missing from a conditional one.
        """
        # fmt: off
        emb = self.embed_timesteps(timesteps)                    # (B, D)
        h = self.features(x, emb, y)                             # (B, C_0, H, W)
        return self.predict(h)                                   # (B, 3 or 6, H, W)
        # fmt: on

    def use_dtype(self, dtype: th.dtype, *, frozen: bool = False) -> None:
        """Choose the arithmetic: float32, or convolutions and attention in bfloat16 or float16.

        Weights, and with them features, are laid out channels last, but for float32 on a GPU.

        Args:
            dtype: of the arithmetic.
            frozen: the network is only evaluated, so the blocks' weights are cast once and for all; else
                parameters stay float32 and are cast as they are used.
        """
        self.compute_dtype = dtype
        on_gpu = self.time_embed[0].weight.device.type == "cuda"
        layout = th.contiguous_format if on_gpu and dtype == th.float32 else th.channels_last
        self.to(memory_format=layout)  # type: ignore[call-overload]
        if frozen and dtype != th.float32:
            for part in (self.input_blocks, self.middle_block, self.output_blocks, self.out):
                for module in part.modules():
                    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                        module.to(dtype)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile fuse what lies between the convolutions of each block, at its first call.

        Block by block: equal blocks compile once, and names and state dicts stay as they are.

        Args:
            backend: torch.compile's.
        """
        limits = th._dynamo.config  # each shape of a block counts as a recompilation of the class
        limits.recompile_limit = max(limits.recompile_limit, 512)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2048)
        for module in self.modules():
            if isinstance(module, (ResBlock, AttentionBlock)):
                module.compile(backend=backend)

    def _autocast(self, x: th.Tensor) -> th.autocast:
        enabled = self.compute_dtype != th.float32
        return th.autocast(x.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)
