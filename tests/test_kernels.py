"""The networks' own operations on the CPU against torch's."""

import pytest
import torch as th
from torch.nn import functional as F

from guided_diffusion.kernels import norm_silu as module
from guided_diffusion.kernels.attention import attention
from guided_diffusion.kernels.norm_silu import keep_mask, norm_silu
from guided_diffusion.nn import GroupNorm32

LAYOUTS = [th.channels_last, th.contiguous_format]


def random_norm(channels=8, groups=4):
    norm = GroupNorm32(groups, channels)
    with th.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def plain(norm, x, scale, shift):
    h = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    return F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, rough", [(th.float32, 2e-6), (th.bfloat16, 4e-3)])
def test_norm_with_all_that_follows_equals_the_single_operations(dtype, rough, layout, monkeypatch):
    th.manual_seed(0)
    monkeypatch.setattr(module, "_PIECE", 2 * 8 * 6 * 5)  # the batch of 5 goes in three pieces
    norm = random_norm()
    x = (th.randn(5, 8, 6, 5) + 10).to(dtype).contiguous(memory_format=layout)
    scale, shift, weights = th.randn(5, 8), th.randn(5, 8), th.randn(5, 8, 6, 5)
    results = []
    for function, wide in ((norm_with_silu, dtype), (plain, th.float64)):
        inputs = [x.detach().to(wide), scale.clone(), shift.clone()]
        gradients_of = [value.requires_grad_() for value in inputs] + list(norm.parameters())
        out = function(norm, *inputs)
        assert out.dtype == wide and out.stride() == x.stride()
        gradients = th.autograd.grad((out * weights).sum(), gradients_of)
        results.append([out.detach(), *gradients])
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        # Contiguous, the single operations are taken, which round in between.
        factor = 1 if layout is th.channels_last else 2
        assert float((ours - exact).norm() / exact.norm()) < factor * rough


def norm_with_silu(norm, x, scale, shift):
    return norm(x, scale, shift, silu=True)


def test_a_norm_alone_is_torchs():
    x, norm = th.randn(3, 8, 4, 4), random_norm()
    exact = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    th.testing.assert_close(norm(x), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_of_the_norm(silu, dropout, monkeypatch):
    th.manual_seed(0)
    monkeypatch.setattr(module, "_PIECE", 20)
    inputs = [
        th.randn(shape, dtype=th.float64, requires_grad=True) for shape in ((3, 4, 3, 2), (3, 4), (3, 4))
    ]

    def seeded(x, gain, bias):
        th.manual_seed(1)
        return norm_silu(x, gain, bias, 2, 1e-5, silu, dropout)

    assert th.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_dropout_keeps(layout):
    x = th.empty(8, 64, 32, 32).contiguous(memory_format=layout)
    th.manual_seed(0)
    kept = keep_mask(x, 0.3)
    assert kept.shape == x.shape and kept.stride() == x.stride() and set(kept.unique().tolist()) == {0, 1}
    bound = 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=bound)
    in_memory = kept.flatten() if layout is th.contiguous_format else kept.permute(0, 2, 3, 1).flatten()
    for quarter in in_memory.view(-1, 4).T:  # of each 64 bits drawn
        assert float(quarter.float().mean()) == pytest.approx(0.7, abs=2 * bound)
    centred = in_memory - 0.7
    for lag in (1, 2, 3, 4, 64, 1024):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 * 0.21 / kept.numel() ** 0.5
    assert not th.equal(keep_mask(x, 0.3), kept)
    th.manual_seed(0)
    assert th.equal(keep_mask(x, 0.3), kept)
    assert keep_mask(th.empty(3), 0.5).shape == (3,)  # no multiple of four


def test_dropout_zeroes_some_and_lets_the_others_grow():
    norm, x = random_norm(), th.randn(4, 8, 8, 8, requires_grad=True)
    full, dropped = norm(x, silu=True), norm(x, silu=True, dropout=0.3)
    zero = dropped == 0
    assert 0.2 < float(zero.float().mean()) < 0.4
    th.testing.assert_close(dropped[~zero], full[~zero] / 0.7)


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
@pytest.mark.parametrize("dtype, rough", [(th.float32, 2e-6), (th.bfloat16, 5e-3)])
@pytest.mark.parametrize("positions", [16, 256])
def test_attention(positions, dtype, rough, layout):
    th.manual_seed(0)
    if layout == "contiguous":
        qkv = th.randn(2, 3, 4, 32, positions).transpose(-1, -2)
    else:
        qkv = th.randn(2, positions, 3, 4, 32).permute(0, 2, 3, 1, 4)
    weights = th.randn(2, 4, positions, 32)
    results = []
    for wide in (dtype, th.float64):
        inputs = qkv.to(dtype).to(wide).requires_grad_()
        q, k, v = inputs.unbind(1)
        exact = (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v
        out = exact if wide == th.float64 else attention(inputs)
        results.append([out.detach(), *th.autograd.grad((out * weights).sum(), [inputs])])
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < rough
    with th.no_grad():
        assert th.equal(attention(qkv.to(dtype)), results[0][0])
