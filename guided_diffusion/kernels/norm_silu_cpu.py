"""`norm_silu` on the CPU, channels last: one pass over the batch forward and one back, written in C.

Torch has a kernel for each of the operations, and memory is what they wait for. Here what lies between them
stays in the cache, and only the input, a mean and a deviation of each group are kept for the backward pass.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from .native import compiled


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
        x: float32 or bfloat16 [B, C, H, W] on the CPU, channels last.
        weight, bias: [C].
        scale, shift: [B, C], or both None.
        before: added to x before the normalisation, [B, C] or [C], or None.
        groups: number of groups of channels.
        eps: added to the variance.
        silu: whether to apply SiLU.
        dropout: probability in [0, 1), to the nearest 1/65536, that an element becomes zero; the others grow
            by 1 / (1 - p).

    Returns:
        [B, C, H, W] of the dtype and layout of x, the same for any number of threads.
    """
    seed = int(th.randint(2**63 - 1, (), device="cpu")) if dropout else 0
    if before is not None:
        x = x + before.expand(x.shape[:2])[:, :, None, None].type(x.dtype)
    gain, bias = (part.float().expand(x.shape[:2]) for part in (weight, bias))
    if scale is not None and shift is not None:
        factor = 1 + scale.float()
        gain, bias = gain * factor, bias * factor + shift
    return _NormSilu.apply(x, gain.contiguous(), bias.contiguous(), groups, eps, silu, dropout, seed)


def try_out() -> None:
    """Compile the functions; raises OSError or RuntimeError where that is not possible."""
    _library()


@functools.cache
def _library() -> ctypes.CDLL:
    return compiled(Path(__file__).with_suffix(".c"))


class _Norm(ctypes.Structure):
    """The C file's."""

    _pointers = ("x", "gain", "bias", "mean", "rstd", "gradient", "out", "g_gain", "g_bias", "scratch")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _pointers),
        *((name, ctypes.c_int64) for name in ("batch", "positions", "channels", "groups")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("eps", "growth")),
        *((name, ctypes.c_int32) for name in ("dropped", "bfloat16", "silu", "threads")),
    )

    def __init__(self, options: tuple[int, float, bool, float, int], **tensors: th.Tensor):
        groups, eps, silu, dropout, seed = options
        x, threads = tensors["x"], th.get_num_threads()
        batch, channels, height, width = x.shape
        scratch = th.empty(threads, 6 * channels + 4, dtype=th.float64, device="cpu")
        self.tensors = tensors | {"scratch": scratch}
        super().__init__(
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
            batch=batch,
            positions=height * width,
            channels=channels,
            groups=groups,
            seed=seed,
            eps=eps,
            growth=1 / (1 - dropout),
            dropped=round(dropout * 2**16),
            bfloat16=x.dtype == th.bfloat16,
            silu=silu,
            threads=threads,
        )


class _NormSilu(th.autograd.Function):
    """See `norm_silu`; gain and bias are float32 [B, C], `seed` decides what is dropped."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, gain: th.Tensor, bias: th.Tensor, *options: Any) -> th.Tensor:
        out = th.empty_like(x)
        mean, rstd = th.empty(2, len(x), options[0], dtype=th.float32, device="cpu")
        norm = _Norm(options, x=x, gain=gain, bias=bias, mean=mean, rstd=rstd, out=out)
        _library().norm_silu_forward(ctypes.byref(norm))
        ctx.save_for_backward(x, gain, bias, mean, rstd)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor | None, ...]:
        names = ("x", "gain", "bias", "mean", "rstd")
        saved = dict(zip(names, ctx.saved_tensors, strict=True))
        saved["x"], gradient = (
            part.contiguous(memory_format=th.channels_last) for part in (saved["x"], gradients[0])
        )
        g_x = th.empty_like(saved["x"])
        g_gain, g_bias = (th.empty_like(saved[name]) for name in ("gain", "bias"))
        norm = _Norm(ctx.options, **saved, gradient=gradient, out=g_x, g_gain=g_gain, g_bias=g_bias)
        _library().norm_silu_backward(ctypes.byref(norm))
        return g_x, g_gain, g_bias, None, None, None, None, None
