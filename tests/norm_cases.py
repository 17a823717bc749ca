"""A fused normalisation against torch's single operations in float64, for every kernel there is."""

import torch as th
from torch.nn import functional as F


def norm_errors(norm_silu, shape, dtype, layout, *, silu, scaled, before, device="cpu"):
    """Relative errors of a kernel's result and of all its gradients.

    Args:
        norm_silu: the kernel's function.
        shape: batch, channels, height and width, groups.
        dtype: of the input, and of scale and shift.
        layout: of the input, which the result must have too.
        silu: with SiLU.
        scaled: with scale and shift.
        before: what is added before: None, "channels" or "samples".
        device: where the kernel runs; torch's operations run on the CPU.
    """
    batch, channels, size, groups = shape
    th.manual_seed(0)
    x = (2 * th.randn(batch, channels, size, size) + 5).to(dtype).contiguous(memory_format=layout)
    inputs = [x, th.randn(channels), th.randn(channels), th.randn(batch, 2 * channels).to(dtype)]
    inputs.append(3 * th.randn(channels) if before == "channels" else 3 * th.randn(batch, channels))
    weights = th.randn_like(x)
    ends = []
    for wide in (False, True):
        ours = [value.double() if wide else value.to(device, copy=True) for value in inputs]
        x, weight, bias, condition, added = (value.requires_grad_() for value in ours)
        scale, shift = condition.chunk(2, dim=1) if scaled else (None, None)
        if wide:
            h = x if before is None else x + added.expand(batch, -1)[..., None, None]
            out = F.group_norm(h, groups, weight, bias, 1e-5)
            if scaled:
                out = out * (1 + scale[..., None, None]) + shift[..., None, None]
            out = F.silu(out) if silu else out
        else:
            more = None if before is None else added
            out = norm_silu(x, weight, bias, scale, shift, more, groups, 1e-5, silu, 0.0)
            assert out.dtype == dtype and out.stride() == x.stride()
        asked = [*ours[: 3 + scaled], *(ours[4:] if before else [])]
        results = [out.detach(), *th.autograd.grad(out, asked, weights.to(out))]
        ends.append([result.cpu() for result in results])
    return [float((mine - exact).norm() / exact.norm()) for mine, exact in zip(*ends, strict=True)]
