"""The sum at the end of a residual block, with the bias of its convolution, in one Triton kernel."""

from typing import Any

import torch as th
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_ELEMENTS = 2048  # of a program


def residual(x: th.Tensor, h: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """x + h + bias, rounded once.

    Args:
        x, h: [B, C, H, W] on a GPU, of one dtype; h contiguous or channels last.
        bias: [C].

    Returns:
        [B, C, H, W] of the dtype and layout of h.
    """
    return _Residual.apply(x, h, bias)


class _Residual(th.autograd.Function):
    """See `residual`."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, h: th.Tensor, bias: th.Tensor) -> th.Tensor:
        ctx.dtype = bias.dtype
        if x.stride() != h.stride():
            x = th.empty_like(h).copy_(x)
        out = th.empty_like(h)
        batch, channels, positions = len(h), h.shape[1], h[0, 0].numel()
        last = not h.is_contiguous()
        # In memory a matrix, whose columns or rows are channels.
        rows, columns = (batch * positions, channels) if last else (batch * channels, positions)
        width = min(256, triton.next_power_of_2(columns))
        height = _ELEMENTS // width
        grid = triton.cdiv(rows, height), triton.cdiv(columns, width)
        _add[grid](x, h, bias, out, rows, columns, channels, HEIGHT=height, WIDTH=width, CHANNELS_LAST=last)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor, ...]:
        gradient = gradients[0]
        return gradient, gradient, gradient.sum((0, 2, 3), dtype=th.float32).to(ctx.dtype)


@triton.jit
def _add(
    x, h, bias, out, rows, columns, channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    where = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    total += tl.load(h + where, mask=there, other=0.0).to(tl.float32)
    if CHANNELS_LAST:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    else:
        total += tl.load(bias + row % channels, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=there)
