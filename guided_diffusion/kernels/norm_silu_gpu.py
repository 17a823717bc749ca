"""`norm_silu` on a GPU: one kernel forward and one backward, written in Triton.

Memory is what these operations wait for. A kernel reads its input once from memory and a second time mostly
from the cache, whatever the layout, and keeps nothing but the input, a mean and a deviation of each group.
"""

from typing import Any

import torch as th
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_CHANNELS = 64  # that a program takes, if groups are not wider: 128 bytes of 16-bit numbers
_POSITIONS = 16  # of a tile; four tiles share a draw of random numbers


def norm_silu(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    scale: th.Tensor | None,
    shift: th.Tensor | None,
    before: th.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> th.Tensor:
    """dropout(silu((weight norm(x + before) + bias) (1 + scale) + shift)), computed in float32.

    Args:
        x: [B, C, H, W] on a GPU, contiguous or channels last, of 16 or 32 bits.
        weight, bias: [C].
        scale, shift: [B, C], or both None.
        before: added to x before the normalisation, [B, C] or [C], or None.
        groups: number of groups of channels.
        eps: added to the variance.
        silu: whether to apply SiLU.
        dropout: probability in [0, 1) that an element becomes zero; the others grow by 1 / (1 - p).

    Returns:
        [B, C, H, W] of the dtype and layout of x.
    """
    seed = th.randint(2**31 - 1, (1,), device=x.device) if dropout else None
    before = None if before is None else before.expand(x.shape[:2])
    scale, shift, before = (
        part if part is None or part.stride(1) == 1 else part.contiguous() for part in (scale, shift, before)
    )
    return _NormSilu.apply(x, weight, bias, scale, shift, before, seed, groups, eps, silu, dropout)


def try_out() -> None:
    """Compile and run a kernel; raises whatever Triton does where it cannot, as without a C compiler.

    It draws no random number: a process begins with this, and one that goes on must draw what the first did.
    """
    x, affine = th.zeros(1, 4, 2, 2, device="cuda"), th.zeros(4, device="cuda")
    seed, rows = th.zeros(1, dtype=th.int64, device="cuda"), affine[None]
    _NormSilu.apply(x, affine, affine, rows, rows, rows, seed, 1, 1e-5, True, 0.5)


class _NormSilu(th.autograd.Function):
    """See `norm_silu`; `seed` int64 [1] decides what is dropped."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, *arguments: Any) -> th.Tensor:
        *inputs, groups, eps, silu, dropout = arguments
        out = th.empty_like(x)
        statistics = x.new_empty((2, len(x), groups), dtype=th.float32)
        grid, common = _launch(x, inputs[2], inputs[3], inputs[4], groups, silu, dropout)
        _forward[grid](x, out, *inputs, statistics, eps=eps, **common)
        ctx.save_for_backward(x, *inputs, statistics)
        ctx.options = groups, silu, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, *inputs, statistics = ctx.saved_tensors
        weight, _, scale, shift, before, _ = inputs
        grid, common = _launch(x, scale, shift, before, *ctx.options)
        gradient = gradients[0]
        if gradient.stride() != x.stride():
            gradient = th.empty_like(x).copy_(gradient)
        g_x = th.empty_like(x)
        kinds = 2 if before is None else 3  # of weight, bias and `before`
        sums = x.new_empty((kinds, *x.shape[:2]), dtype=th.float32)
        g_scale, g_shift = (
            None if part is None else th.empty(part.shape, dtype=part.dtype, device=part.device)
            for part in (scale, shift)
        )
        _backward[grid](x, gradient, g_x, *inputs, statistics, sums, g_scale, g_shift, **common)
        g_weight, g_bias = sums[:2].sum(1).to(weight.dtype)
        g_before = None if before is None else sums[2].to(before.dtype)
        return g_x, g_weight, g_bias, g_scale, g_shift, g_before, None, None, None, None, None


def _launch(
    x: th.Tensor,
    scale: th.Tensor | None,
    shift: th.Tensor | None,
    before: th.Tensor | None,
    groups: int,
    silu: bool,
    dropout: float,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs of a kernel, and the arguments that both kernels have."""
    batch, channels, positions = len(x), x.shape[1], x[0, 0].numel()
    width = channels // groups
    taken = max(1, min(groups, _CHANNELS // width))  # groups of a program
    tile = min(_POSITIONS, triton.next_power_of_2(triton.cdiv(positions, 4)))
    block = triton.next_power_of_2(taken * width)
    last = x.is_contiguous(memory_format=th.channels_last) and not x.is_contiguous()
    return (batch, triton.cdiv(groups, taken)), {
        "positions": positions,
        "channels": channels,
        "groups": groups,
        "scale_row": 0 if scale is None else scale.stride(0),
        "shift_row": 0 if shift is None else shift.stride(0),
        "before_row": 0 if before is None else before.stride(0),
        "threshold": min(round(dropout * 2**31), 2**31 - 1),
        "growth": 1 / (1 - dropout),
        "WIDTH": width,
        "TAKEN": taken,
        "BLOCK": block,
        "TILE": tile,
        "CHANNELS_LAST": last,
        "SILU": silu,
        "DROPOUT": dropout > 0,
        "SCALED": scale is not None,
        "BEFORE": before is not None,
        "num_warps": max(1, min(8, block * tile // 128)),  # four elements of a tile for each thread
    }


@triton.jit
def _over_group(values, group, inside):
    """[BLOCK] -> for each channel the sum over those of its group."""
    same = (group[:, None] == group[None, :]) & inside[None, :]
    return tl.sum(tl.where(same, values[None, :], 0.0), axis=1)


@triton.jit
def _row(values, b, row, c, inside):
    """A sample's values, float32 for each channel."""
    return tl.load(values + b * row + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _affine(weight, bias, c, inside):
    """Each channel's weight and bias."""
    return _row(weight, 0, 0, c, inside), _row(bias, 0, 0, c, inside)


@triton.jit
def _scaled(w, o, scale, shift, c, inside, b, scale_row, shift_row, SCALED: tl.constexpr):
    """(1 + scale), and each channel's gain and offset after the norm."""
    factor = tl.full(w.shape, 1.0, tl.float32)
    gain, offset = w, o
    if SCALED:
        factor += _row(scale, b, scale_row, c, inside)
        gain = w * factor
        offset = o * factor + _row(shift, b, shift_row, c, inside)
    return factor, gain, offset


@triton.jit
def _tile(p, c, inside, positions, channels, CHANNELS_LAST: tl.constexpr):
    """Where the elements of positions x channels lie in a sample, and whether there are such."""
    where = (p[:, None] * channels + c[None, :]) if CHANNELS_LAST else (c[None, :] * positions + p[:, None])
    return where, (p < positions)[:, None] & inside[None, :]


@triton.jit
def _draws(seed, base, p, c, positions, channels, CHANNELS_LAST: tl.constexpr, DROPOUT: tl.constexpr):
    """Four random numbers for each element of a tile: its own, and those of the three tiles after it."""
    where, _ = _tile(p, c, c >= 0, positions, channels, CHANNELS_LAST)
    element = (base + where).to(tl.int32)
    draws = element, element, element, element
    if DROPOUT:
        draws = tl.randint4x(tl.load(seed), element)
    return draws


@triton.jit
def _kept(part: tl.constexpr, d0, d1, d2, d3, threshold):
    """What dropout keeps of one of four tiles, by 31 random bits."""
    draw = d0 if part == 0 else (d1 if part == 1 else (d2 if part == 2 else d3))
    return (draw & 0x7FFFFFFF) >= threshold


@triton.jit
def _forward(
    x, out, weight, bias, scale, shift, before, seed, statistics,
    positions, channels, groups, scale_row, shift_row, before_row, threshold, growth, eps,
    WIDTH: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TAKEN
    local = tl.arange(0, BLOCK)
    c, group = first * WIDTH + local, local // WIDTH
    inside = (local < TAKEN * WIDTH) & (c < channels)
    base = b * channels * positions
    x, out = x + base, out + base
    # Sums of what is left of x less about its mean, so that squares keep their digits.
    where, there = _tile(tl.arange(0, TILE), c, inside, positions, channels, CHANNELS_LAST)
    v = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    near = tl.sum(v, axis=0) / tl.minimum(positions, TILE)
    total, squares = tl.zeros((TILE, BLOCK), tl.float32), tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, positions, 4 * TILE):
        for part in tl.static_range(4):  # four loads at once
            p = start + part * TILE + tl.arange(0, TILE)
            where, there = _tile(p, c, inside, positions, channels, CHANNELS_LAST)
            v = tl.load(x + where, mask=there, other=0.0).to(tl.float32) - near[None, :]
            v = tl.where(there, v, 0.0)
            total += v
            squares += v * v
    mean = tl.sum(total, axis=0) / positions
    m2 = tl.sum(squares, axis=0) - mean * mean * positions
    mean += near
    if BEFORE:
        mean += _row(before, b, before_row, c, inside)
    centre = _over_group(mean, group, inside) / WIDTH
    away = mean - centre
    variance = _over_group(m2 / positions + away * away, group, inside) / WIDTH
    rstd = 1.0 / tl.sqrt(variance + eps)
    row = b * groups + first + group
    one = inside & (local % WIDTH == 0)
    tl.store(statistics + row, centre, mask=one)
    tl.store(statistics + tl.num_programs(0) * groups + row, rstd, mask=one)

    w, o = _affine(weight, bias, c, inside)
    _, gain, offset = _scaled(w, o, scale, shift, c, inside, b, scale_row, shift_row, SCALED)
    if BEFORE:
        centre -= _row(before, b, before_row, c, inside)  # that of x itself
    gain *= rstd
    offset -= gain * centre
    for start in range(0, positions, 4 * TILE):
        p = start + tl.arange(0, TILE)
        d0, d1, d2, d3 = _draws(seed, base, p, c, positions, channels, CHANNELS_LAST, DROPOUT)
        for part in tl.static_range(4):
            where, there = _tile(p + part * TILE, c, inside, positions, channels, CHANNELS_LAST)
            h = tl.load(x + where, mask=there, other=0.0).to(tl.float32) * gain[None, :] + offset[None, :]
            if SILU:
                h = h * tl.sigmoid(h)
            if DROPOUT:
                h = tl.where(_kept(part, d0, d1, d2, d3, threshold), h * growth, 0.0)
            tl.store(out + where, h.to(out.dtype.element_ty), mask=there)


@triton.jit
def _gradient(
    x, g, where, there, centre, rstd, gain, offset, part: tl.constexpr, d0, d1, d2, d3, threshold, growth,
    SILU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile's gradient before SiLU, and its normalised x."""
    normed = (tl.load(x + where, mask=there, other=0.0).to(tl.float32) - centre[None, :]) * rstd[None, :]
    gradient = tl.load(g + where, mask=there, other=0.0).to(tl.float32)
    if DROPOUT:
        gradient = tl.where(_kept(part, d0, d1, d2, d3, threshold), gradient * growth, 0.0)
    if SILU:
        h = normed * gain[None, :] + offset[None, :]
        s = tl.sigmoid(h)
        gradient = gradient * s * (1.0 + h * (1.0 - s))
    return gradient, tl.where(there, normed, 0.0)


@triton.jit
def _backward(
    x, g, g_x, weight, bias, scale, shift, before, seed, statistics, sums, g_scale, g_shift,
    positions, channels, groups, scale_row, shift_row, before_row, threshold, growth,
    WIDTH: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr,
    BEFORE: tl.constexpr,
):  # fmt: skip
    b, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TAKEN
    batch = tl.num_programs(0)
    local = tl.arange(0, BLOCK)
    c, group = first * WIDTH + local, local // WIDTH
    inside = (local < TAKEN * WIDTH) & (c < channels)
    base = b * channels * positions
    x, g, g_x = x + base, g + base, g_x + base
    row = b * groups + first + group
    centre = tl.load(statistics + row, mask=inside, other=0.0)
    if BEFORE:
        centre -= _row(before, b, before_row, c, inside)
    rstd = tl.load(statistics + batch * groups + row, mask=inside, other=0.0)
    w, o = _affine(weight, bias, c, inside)
    factor, gain, offset = _scaled(w, o, scale, shift, c, inside, b, scale_row, shift_row, SCALED)

    ones, along = tl.zeros((TILE, BLOCK), tl.float32), tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, positions, 4 * TILE):
        p = start + tl.arange(0, TILE)
        d0, d1, d2, d3 = _draws(seed, base, p, c, positions, channels, CHANNELS_LAST, DROPOUT)
        for part in tl.static_range(4):
            where, there = _tile(p + part * TILE, c, inside, positions, channels, CHANNELS_LAST)
            gradient, normed = _gradient(
                x, g, where, there, centre, rstd, gain, offset, part, d0, d1, d2, d3, threshold, growth,
                SILU, DROPOUT,
            )  # fmt: skip
            ones += gradient
            along += gradient * normed
    along_ones, along_x = tl.sum(ones, axis=0), tl.sum(along, axis=0)

    tl.store(sums + b * channels + c, factor * along_x, mask=inside)
    tl.store(sums + (batch + b) * channels + c, factor * along_ones, mask=inside)
    if SCALED:
        g_s = w * along_x + o * along_ones
        tl.store(g_scale + b * channels + c, g_s.to(g_scale.dtype.element_ty), mask=inside)
        tl.store(g_shift + b * channels + c, along_ones.to(g_shift.dtype.element_ty), mask=inside)
    size = positions * WIDTH
    along_ones = _over_group(along_ones * gain, group, inside) / size
    along_x = _over_group(along_x * gain, group, inside) / size
    ones = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, positions, 4 * TILE):
        p = start + tl.arange(0, TILE)
        d0, d1, d2, d3 = _draws(seed, base, p, c, positions, channels, CHANNELS_LAST, DROPOUT)
        for part in tl.static_range(4):
            where, there = _tile(p + part * TILE, c, inside, positions, channels, CHANNELS_LAST)
            gradient, normed = _gradient(
                x, g, where, there, centre, rstd, gain, offset, part, d0, d1, d2, d3, threshold, growth,
                SILU, DROPOUT,
            )  # fmt: skip
            # What the mean and the variance take away.
            own = (gradient * gain[None, :] - along_ones[None, :] - normed * along_x[None, :]) * rstd[None, :]
            tl.store(g_x + where, own.to(g_x.dtype.element_ty), mask=there)
            ones += tl.where(there, own, 0.0)
    if BEFORE:
        tl.store(sums + (2 * batch + b) * channels + c, tl.sum(ones, axis=0), mask=inside)
