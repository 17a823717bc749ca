"""The Triton kernel in Triton's interpreter against the single operations; run by test_gpu_kernels.py."""

import itertools

import pytest
import torch as th
from torch.nn import functional as F

from guided_diffusion.kernels.norm_silu_gpu import norm_silu

SIZES = [  # batch, channels, height and width, groups: that fill tiles and blocks, and that do not
    (2, 64, 8, 32),
    (3, 192, 5, 32),
    (2, 160, 12, 2),
    (1, 40, 3, 5),
    (2, 20, 1, 4),
]


@pytest.mark.parametrize("layout", [th.channels_last, th.contiguous_format])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_kernel_equals_the_single_operations(silu, scaled, layout):
    for (batch, channels, size, groups), dtype in itertools.product(SIZES, (th.float32, th.bfloat16)):
        th.manual_seed(0)
        x = (2 * th.randn(batch, channels, size, size) + 5).to(dtype).contiguous(memory_format=layout)
        inputs = [x, th.randn(channels), th.randn(channels), th.randn(batch, 2 * channels).to(dtype)]
        weights = th.randn_like(x)
        ends = []
        for wide in (False, True):
            ours = [value.double() if wide else value.clone() for value in inputs]
            x, weight, bias, condition = (value.requires_grad_() for value in ours)
            scale, shift = condition.chunk(2, dim=1) if scaled else (None, None)
            if wide:
                out = F.group_norm(x, groups, weight, bias, 1e-5)
                if scaled:
                    out = out * (1 + scale[..., None, None]) + shift[..., None, None]
                out = F.silu(out) if silu else out
            else:
                out = norm_silu(x, weight, bias, scale, shift, groups, 1e-5, silu, 0.0)
                assert out.dtype == dtype and out.stride() == x.stride()
            gradients = th.autograd.grad(out, ours[: 3 + scaled], weights.to(out))
            ends.append([out.detach(), *gradients])
        for mine, exact in zip(*ends, strict=True):
            assert float((mine - exact).norm() / exact.norm()) < (1e-6 if dtype == th.float32 else 6e-3)


def test_what_the_kernel_drops():
    x = th.randn(2, 64, 16, 16).contiguous(memory_format=th.channels_last).requires_grad_()
    affine = th.ones(64), th.zeros(64), None, None
    dropped, whole = (norm_silu(x, *affine, 32, 1e-5, True, p) for p in (0.3, 0.0))
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=5 * (0.21 / kept.numel()) ** 0.5)
    th.testing.assert_close(dropped, whole * kept / 0.7)
    in_memory = kept.permute(0, 2, 3, 1).flatten().float() - 0.7
    for lag in (1, 64, 16 * 64, 4 * 16 * 64):  # channels, positions, tiles that share a draw, draws
        assert abs(float((in_memory[lag:] * in_memory[:-lag]).mean())) < 5 * 0.21 / kept.numel() ** 0.5
    weights = th.randn_like(x)
    ours, exact = (th.autograd.grad(out, x, weights)[0] for out in (dropped, whole * kept / 0.7))
    th.testing.assert_close(ours, exact)
