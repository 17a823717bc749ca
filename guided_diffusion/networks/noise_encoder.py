"""The noise encoder of TCCD's stage 1: a small ViT over the U-Net's last feature map.

"An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021) with 16 patches at every size that 4 divides, four
pre-norm blocks and the class token as output. It is a head of the student during training only, kept
outside the U-Net, so that checkpoints stay plain ADM and sampling never sees it. Parameter names are
those that the published TCCD checkpoints carry under `out_embed.`.
"""

import torch as th
from torch import nn
from torch.nn import functional as F

PATCHES_PER_SIDE = 4
DEPTH = 4
HEADS = 8
HEAD_WIDTH = 64
MLP_WIDTH = 256


class PatchFlatten(nn.Module):
    """Cut a map into patch x patch squares, row-major; inside one: row, column, channel."""

    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def forward(self, h: th.Tensor) -> th.Tensor:
        """[B, C, H, W] -> [B, ceil(H / patch) ceil(W / patch), patch patch C]; zeros beyond the edges."""
        batch, channels, height, width = h.shape
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        h = F.pad(h, (0, columns * self.patch - width, 0, rows * self.patch - height))
        h = h.reshape(batch, channels, rows, self.patch, columns, self.patch)
        return h.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


class Attention(nn.Module):
    """Multi-head self-attention, q/k/v without bias, scale 1/sqrt(head width)."""

    def __init__(self, dim: int):
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, _ = x.shape
        qkv = self.to_qkv(x).reshape(batch, tokens, 3, HEADS, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, heads, N, 64)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).reshape(batch, tokens, -1))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        # Entries 2 and 4 of the published layout are dropouts of probability 0.
        self.net = nn.Sequential(
            nn.Linear(dim, MLP_WIDTH), nn.GELU(), nn.Identity(), nn.Linear(MLP_WIDTH, dim)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.net(x)


class PreNorm(nn.Module):
    """x + fn(LayerNorm(x))."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x + self.fn(self.norm(x))


class Transformer(nn.Module):
    """The stack of blocks; no final normalisation."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(dim, Attention(dim)), PreNorm(dim, FeedForward(dim))])
            for _ in range(DEPTH)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[B, N, D] -> [B, N, D]."""
        for block in self.layers:
            for layer in block:  # type: ignore[attr-defined]
                x = layer(x)
        return x


class NoiseEncoder(nn.Module):
    """Noise representation z of the feature map h that the student's noise prediction is read from.

    Args:
        feature_shape: (C, H, W) of the feature map, or of the map that a transformer's tokens make. A patch
            is a square of side ceil(max(H, W) / 4); there are as many as cover the map, which is padded with
            zeros on the right and below where they do not divide it. So a square map whose side 4 divides
            has 16 patches (at 32x32 the published 8x8), a map smaller than 4x4 one for each position, and
            one of 7x7 16 of 2x2.
        dim: size D of the timestep embedding that z is aligned with.
    """

    def __init__(self, feature_shape: tuple[int, int, int], dim: int):
        super().__init__()
        channels, height, width = feature_shape
        patch = -(-max(height, width) // PATCHES_PER_SIDE)
        count = -(-height // patch) * -(-width // patch)
        self.to_patch_embedding = nn.Sequential(PatchFlatten(patch), nn.Linear(patch * patch * channels, dim))
        self.pos_embedding = nn.Parameter(th.randn(1, count + 1, dim))
        self.cls_token = nn.Parameter(th.randn(1, 1, dim))
        self.transformer = Transformer(dim)

    def forward(self, h: th.Tensor) -> th.Tensor:
        """float32 [B, C, H, W] -> float32 [B, D]."""
        # fmt: off
        patches = self.to_patch_embedding(h)                     # (B, N, D)
        token = self.cls_token.expand(len(h), -1, -1)            # (B, 1, D)
        tokens = th.cat([token, patches], dim=1)                 # (B, N+1, D)
        tokens = self.transformer(tokens + self.pos_embedding)   # (B, N+1, D)
        return tokens[:, 0]                                      # (B, D)
        # fmt: on
