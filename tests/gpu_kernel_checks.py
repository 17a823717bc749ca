"""The Triton kernel in Triton's interpreter against the single operations; run by test_gpu_kernels.py."""

import itertools

import pytest
import torch as th
from norm_cases import norm_errors
from tiny import denoiser, network, randomise

from guided_diffusion import nn
from guided_diffusion.kernels.norm_silu_gpu import norm_silu, try_out
from guided_diffusion.kernels.residual_gpu import residual
from guided_diffusion.script_util import build_network

SIZES = [  # batch, channels, height and width, groups: that fill tiles and blocks, and that do not
    (2, 64, 4, 32),
    (1, 192, 5, 32),
    (1, 160, 6, 2),
    (2, 20, 1, 4),
]


@pytest.mark.parametrize("layout", [th.channels_last, th.contiguous_format])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("before", [None, "channels", "samples"])
@pytest.mark.parametrize("silu", [False, True])
def test_the_kernel_equals_the_single_operations(silu, before, scaled, layout):
    dtypes = (th.float32, th.bfloat16) if silu and scaled else (th.float32,)
    for shape, dtype in itertools.product(SIZES, dtypes):
        errors = norm_errors(norm_silu, shape, dtype, layout, silu=silu, scaled=scaled, before=before)
        assert max(errors) < (1e-6 if dtype == th.float32 else 6e-3)


def test_what_the_kernel_drops():
    x = th.randn(2, 64, 16, 16).contiguous(memory_format=th.channels_last).requires_grad_()
    affine = th.ones(64), th.zeros(64), None, None, None
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


@pytest.mark.parametrize("layout", [th.channels_last, th.contiguous_format])
@pytest.mark.parametrize("shape", [(3, 40, 5, 5), (2, 300, 4, 4), (1, 8, 1, 1)])
def test_the_kernel_of_the_sum(shape, layout):
    x, h = (th.randn(shape).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    bias = th.randn(shape[1], requires_grad=True)
    for first in (x, x.detach().clone(memory_format=th.contiguous_format).requires_grad_()):
        out = residual(first, h, bias)
        assert out.stride() == h.stride()
        exact = first + h + bias[:, None, None]
        th.testing.assert_close(out, exact)
        weights = th.randn_like(out)
        pair = (th.autograd.grad(value, (first, h, bias), weights) for value in (out, exact))
        for mine, theirs in zip(*pair, strict=True):
            th.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype, rough", [(th.float32, 1e-5), (th.bfloat16, 0.08)])
@pytest.mark.parametrize("film", [False, True])
def test_a_network_by_the_kernels(film, dtype, rough, monkeypatch):
    settings = denoiser(**network(8, 32, use_scale_shift_norm=film, attention_resolutions="4"))
    model, _ = build_network(settings)
    randomise(model)
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 17])
    ends = []
    for wide, kernel in ((dtype, lambda _: norm_silu), (th.float32, lambda _: None)):
        monkeypatch.setattr(nn, "fused", kernel)
        model.use_dtype(wide)
        out = model(x, t)
        ends.append([out.detach(), *th.autograd.grad(out.square().sum(), list(model.parameters()))])
    norms = [float(theirs.norm()) for theirs in ends[1]]
    for mine, theirs, norm in zip(*ends, norms, strict=True):
        assert float((mine - theirs).norm()) < rough * (norm + 0.01 * max(norms[1:]))


def test_trying_out_draws_nothing(monkeypatch):
    """Else a process that continues a run would draw other numbers than the one that never stopped."""
    zeros = th.zeros
    monkeypatch.setattr(th, "zeros", lambda *size, device=None, **keys: zeros(*size, **keys))
    before = th.get_rng_state()
    try_out()
    assert th.equal(th.get_rng_state(), before)
