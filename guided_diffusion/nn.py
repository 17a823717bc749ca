"""Small pieces shared by the networks."""

import functools
import math
from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

import torch as th
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import first_line
from .io.progress import warn
from .kernels.dropout import keep_mask

_M = TypeVar("_M", bound=nn.Module)


@functools.cache
def norm_kernel(device: str) -> Callable[..., th.Tensor] | None:
    """`norm_silu` of `kernels.norm_silu_cpu` or `kernels.norm_silu_gpu`, where it can be compiled.

    Args:
        device: "cpu", for which a C compiler is needed, or "cuda", for which Triton is.
    """
    compiler = "the C compiler" if device == "cpu" else "Triton"
    try:
        module = import_module(f".kernels.norm_silu_{'cpu' if device == 'cpu' else 'gpu'}", __package__)
        module.try_out()
    except ImportError:
        return None
    except Exception as error:  # whatever is amiss with the machine's compilers
        warn(f"{compiler} does not work here ({first_line(error)}); normalising by torch's slower kernels")
        return None
    return module.norm_silu


def fused(x: th.Tensor) -> Callable[..., th.Tensor] | None:
    """`norm_kernel`, if it is for x and torch.compile does not do the same.

    On a GPU it is for all but float64, on the CPU for float32 and bfloat16 in channels last: contiguous,
    torch's kernels are the ones whose digits the originals' numbers have.
    """
    last = x.is_contiguous(memory_format=th.channels_last)
    fits = {
        "cuda": x.dtype != th.float64 and (last or x.is_contiguous()),
        "cpu": x.dtype in (th.float32, th.bfloat16) and last,
    }
    return norm_kernel(x.device.type) if fits.get(x.device.type) and not th.compiler.is_compiling() else None


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the input's dtype; the output has the input's."""

    def forward(
        self,
        x: th.Tensor,
        scale: th.Tensor | None = None,
        shift: th.Tensor | None = None,
        *,
        before: th.Tensor | None = None,
        silu: bool = False,
        dropout: float = 0.0,
    ) -> th.Tensor:
        """dropout(silu(norm(x + before) (1 + scale) + shift)), or as much of it as is asked for.

        Args:
            x: [B, C, H, W].
            scale: [B, C], or None.
            shift: [B, C], or None where scale is.
            before: added to x before the normalisation, [B, C] or [C], or None.
            silu: whether to apply SiLU.
            dropout: probability, in [0, 1).

        Returns:
            [B, C, H, W] of the dtype of x.
        """
        kernel = fused(x)
        if kernel is not None:
            rows = self.weight, self.bias, scale, shift, before
            return kernel(x, *rows, self.num_groups, self.eps, silu, dropout)
        if before is not None:
            x = x + before.expand(x.shape[:2])[:, :, None, None].type(x.dtype)
        h = super().forward(x.float()).type(x.dtype)
        if scale is not None and shift is not None:
            scale, shift = (part[:, :, None, None].type(x.dtype) for part in (scale, shift))
            h = h * (1 + scale) + shift
        h = F.silu(h) if silu else h
        if dropout and h.device.type == "cpu" and not th.compiler.is_compiling():
            return h * keep_mask(h, dropout).to(h.dtype).mul_(1 / (1 - dropout))
        return F.dropout(h, dropout, dropout > 0)


def convolved(conv: nn.Module, x: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
    """A convolution of x, and what is still to be added to it.

    On a GPU that is its bias, [C], which torch adds by a kernel of its own: what comes next adds it on its
    way. Elsewhere it is None.
    """
    assert isinstance(conv, nn.Conv2d)
    if not x.is_cuda or fused(x) is None:
        return conv(x), None
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias


def residual(x: th.Tensor, h: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """x + h + bias: [B, C, H, W] twice, and [C] or None."""
    if bias is None:
        return x + h
    if x.dtype != h.dtype:
        return x + (h + bias[:, None, None])
    from .kernels.residual_gpu import residual as kernel

    return kernel(x, h, bias)


def zero_module(module: _M) -> _M:
    """Fill a module's parameters with zeros and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000) -> th.Tensor:
    """Sinusoidal timestep embeddings, cosines first ("Attention Is All You Need", section 3.5).

    Args:
        timesteps: [B], integer or fractional.
        dim: size of the embedding; a last zero column is added when it is odd.
        max_period: the longest wavelength is 2 pi times this.

    Returns:
        float32 [B, dim].
    """
    half = dim // 2
    # In ADM's order of operations: at t ~ 1000 a last-digit difference here is 1e-4 in the angle.
    steps = th.arange(half, dtype=th.float32, device=timesteps.device)
    frequencies = th.exp(-math.log(max_period) * steps / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return F.pad(th.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def mean_flat(x: th.Tensor) -> th.Tensor:
    """Mean over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).mean(dim=1)


def checkpointed(function: Callable[..., th.Tensor], enabled: bool, *inputs: th.Tensor) -> th.Tensor:
    """Call `function(*inputs)`; when enabled, and gradients are recorded, backward computes it again."""
    if enabled and th.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
