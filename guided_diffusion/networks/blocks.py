"""The blocks of the ADM U-Net ("Diffusion Models Beat GANs", Dhariwal & Nichol, 2021, section 3)."""

import torch as th
from torch import nn
from torch.nn import functional as F

from ..kernels.attention import attention
from ..nn import GroupNorm32, checkpointed, convolved, residual, zero_module


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Halving by a strided 3x3 convolution if `use_conv`, else by 2x2 averages."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        if use_conv:
            self.op: nn.Module = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.op = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep embedding, optionally resampling up or down."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        groups: int,
        use_scale_shift_norm: bool,
        use_checkpoint: bool,
        resample: type[Upsample] | type[Downsample] | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample = resample(channels, use_conv=False) if resample else None
        self.in_layers = nn.Sequential(
            GroupNorm32(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        """[B, C, H, W] and [B, D] -> [B, C', H', W']."""
        return checkpointed(self._forward, self.use_checkpoint, x, emb)

    def _forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        norm_in, _, conv_in = self.in_layers
        h = norm_in(x, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h, before = convolved(conv_in, h)
        condition = self.emb_layers(emb)
        norm_out, _, dropout, conv_out = self.out_layers
        p = dropout.p if dropout.training else 0.0
        scale = shift = None
        if self.use_scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
        else:
            before = condition if before is None else before + condition
        h = norm_out(h, scale, shift, before=before, silu=True, dropout=p)
        return residual(self.skip_connection(x), *convolved(conv_out, h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions.

    Args:
        channels: width C.
        num_heads: number of heads, each of width C / num_heads.
        groups: groups of the normalisation.
        new_order: how the 3C outputs of `qkv` are packed: (q, k, v) each over all heads when true,
            else the "legacy" order, (q, k, v) within each head.
        use_checkpoint: recompute in backward.
    """

    def __init__(self, channels: int, num_heads: int, groups: int, new_order: bool, use_checkpoint: bool):
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm32(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, C, H, W] -> the same shape."""
        return checkpointed(self._forward, self.use_checkpoint, x)

    def _forward(self, x: th.Tensor) -> th.Tensor:
        # As 2-d convolutions: channels last, no copies are needed around them.
        qkv = F.conv2d(self.norm(x), self.qkv.weight[..., None], self.qkv.bias)
        if self.new_order:
            parts = qkv.flatten(2).unflatten(1, (3, self.num_heads, -1))
        else:
            parts = qkv.flatten(2).unflatten(1, (self.num_heads, 3, -1)).transpose(1, 2)
        h = attention(parts.transpose(-1, -2))  # [B, heads, HW, C / heads]
        h = h.transpose(-1, -2).reshape(x.shape)
        return x + F.conv2d(h, self.proj_out.weight[..., None], self.proj_out.bias)


class TimestepSequential(nn.Sequential):
    """A sequence whose residual blocks also receive the timestep embedding."""

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:  # type: ignore[override]
        """[B, C, H, W] and [B, D] -> [B, C', H', W']."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
