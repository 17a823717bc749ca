"""Group normalisation, scale and shift, SiLU and dropout as one operation.

Torch has a kernel for each, and memory is what they wait for on the CPU. Here they are done together, piece
by piece of the batch, so that what lies between them stays in the cache, and only the input is kept for the
backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_PIECE = 1 << 17  # elements that a thread takes at once: three such float32 arrays fit in 2 MB


def norm_silu(
    x: th.Tensor, gain: th.Tensor, bias: th.Tensor, groups: int, eps: float, silu: bool, dropout: float
) -> th.Tensor:
    """dropout(silu(gain norm(x) + bias)) on the CPU, computed in float32, or in float64 if x is.

    Args:
        x: [B, C, H, W].
        gain, bias: [B, C].
        groups: number of groups of channels.
        eps: added to the variance.
        silu: whether to apply SiLU.
        dropout: probability in [0, 1) that an element becomes zero; the others grow by 1 / (1 - p).

    Returns:
        [B, C, H, W] of the dtype of x.
    """
    kept = keep_mask(x, dropout) if dropout else None
    gain, bias = gain[:, :, None, None], bias[:, :, None, None]
    return _NormSilu.apply(x, gain, bias, kept, groups, eps, silu, 1 / (1 - dropout))


def keep_mask(x: th.Tensor, p: float) -> th.Tensor:
    """int16, shaped and laid out as x: 0 with probability p (to the nearest 1/65536), else 1.

    Every 64 bits drawn from torch's global generator decide four elements: Bernoulli draws take ten times
    as long on the CPU.
    """
    words = th.empty((x.numel() + 3) // 4, dtype=th.int64).random_(-(2**63), None)
    draws = words.view(th.int16)[: x.numel()]
    mask = th.empty_like(x, dtype=th.int16)
    return draws.ge_(round(p * 2**16) - 2**15).as_strided(mask.shape, mask.stride())


class _NormSilu(th.autograd.Function):
    """See `norm_silu`; gain and bias are [B, C, 1, 1], `growth` is the factor of what dropout keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        gain: th.Tensor,
        bias: th.Tensor,
        kept: th.Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        growth: float,
    ) -> th.Tensor:
        out, statistics = th.empty_like(x), []
        size = x[0].numel() // groups
        for (x_, out_, gain_, bias_, *kept_), (centred, h) in _pieces(2, x, out, gain, bias, kept):
            centred.copy_(x_)
            mean = _over_groups(centred.sum((2, 3)), groups, size)
            centred -= mean
            squares = th.mul(centred, centred, out=h).sum((2, 3))
            rstd = _over_groups(squares, groups, size).add_(eps).rsqrt_()
            th.addcmul(bias_, centred, rstd * gain_, out=h)
            if silu:
                F.silu(h, inplace=True)
            for mask in kept_:
                th.addcmul(h.new_zeros(()), h, centred.copy_(mask), value=growth, out=h)
            out_.copy_(h)
            statistics.append((mean, rstd))
        means, rstds = (th.cat(parts) for parts in zip(*statistics, strict=True))
        ctx.save_for_backward(x, gain, bias, kept, means, rstds)
        ctx.groups, ctx.silu, ctx.growth = groups, silu, growth
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, gain, bias, kept, means, rstds = ctx.saved_tensors
        g_x, sums = th.empty_like(x), []
        size = x[0].numel() // ctx.groups
        tensors = (x, *gradients, g_x, gain, bias, means, rstds, kept)
        for (x_, g_, g_x_, gain_, bias_, mean, rstd, *kept_), (g, centred, h) in _pieces(3, *tensors):
            slope = rstd * gain_
            g.copy_(g_)
            for mask in kept_:
                th.addcmul(g.new_zeros(()), g, h.copy_(mask), value=ctx.growth, out=g)
            centred.copy_(x_).sub_(mean)
            if ctx.silu:
                th.addcmul(bias_, centred, slope, out=h)
                th.ops.aten.silu_backward.grad_input(g, h, grad_input=g)
            g_bias = g.sum((2, 3), keepdim=True)
            g_gain = th.mul(g, centred, out=h).sum((2, 3), keepdim=True).mul_(rstd)
            sums.append((g_gain, g_bias))
            # What the mean and the variance take away.
            along_ones = _over_groups((g_bias * slope).flatten(1), ctx.groups, -size)
            along_x = _over_groups((g_gain * slope).flatten(1), ctx.groups, -size).mul_(rstd)
            th.addcmul(along_ones, centred, along_x, out=h)
            g_x_.copy_(th.addcmul(h, g, slope, out=h))
        g_gain, g_bias = (th.cat(parts) for parts in zip(*sums, strict=True))
        return g_x, g_gain, g_bias, None, None, None, None, None


def _pieces(
    count: int, x: th.Tensor, *more: th.Tensor | None
) -> Iterator[tuple[tuple[th.Tensor, ...], list[th.Tensor]]]:
    """Slices of the batch of every tensor there is, and `count` wide buffers shaped and laid out as x's."""
    size = max(1, _PIECE * th.get_num_threads() // x[0].numel())
    dtype = th.promote_types(x.dtype, th.float32)
    buffers = [th.empty_like(x[:size], dtype=dtype) for _ in range(count)]
    tensors = [tensor for tensor in (x, *more) if tensor is not None]
    for pieces in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield pieces, [buffer[: len(pieces[0])] for buffer in buffers]


def _over_groups(sums: th.Tensor, groups: int, size: int) -> th.Tensor:
    """Sums [B, C] over positions -> [B, C, 1, 1], for each channel its group's, divided by `size`."""
    totals = sums.view(len(sums), groups, -1).sum(2, keepdim=True).div_(size)
    return totals.expand(-1, -1, sums.shape[1] // groups).reshape(*sums.shape, 1, 1)
