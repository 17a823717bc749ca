"""The networks' own operations on the CPU against torch's."""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch as th
from norm_cases import norm_errors
from torch.nn import functional as F

from guided_diffusion import nn
from guided_diffusion.kernels import native, norm_silu_cpu
from guided_diffusion.kernels.attention import attention
from guided_diffusion.kernels.dropout import keep_mask
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
def test_norm_with_all_that_follows_equals_the_single_operations(dtype, rough, layout):
    th.manual_seed(0)
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


needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
SIZES = [  # batch, channels, height and width, groups: even shares for vectors and threads, and uneven ones
    (2, 64, 24, 32),
    (1, 192, 5, 32),
    (3, 20, 1, 4),
    (1, 160, 9, 2),
]
WITHOUT = None, None, None  # scale, shift and what is added before


@needs_compiler
@pytest.mark.parametrize("before", [None, "channels", "samples"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_the_kernel_equals_the_single_operations(dtype, silu, before):
    for shape, scaled in itertools.product(SIZES, (False, True)):
        errors = norm_errors(
            norm_silu_cpu.norm_silu, shape, dtype, th.channels_last, silu=silu, scaled=scaled, before=before
        )
        assert max(errors) < (1e-6 if dtype == th.float32 else 8e-3)


@needs_compiler
def test_the_kernel_gives_the_same_with_any_number_of_threads_and_in_any_company():
    x = th.randn(3, 48, 16, 16).contiguous(memory_format=th.channels_last).requires_grad_()
    affine, weights = (th.randn(48), th.randn(48)), th.randn(3, 48, 16, 16)
    threads, ends = th.get_num_threads(), []
    try:
        for count, samples in ((1, 3), (2, 3), (7, 3), (2, 1)):
            th.set_num_threads(count)
            th.manual_seed(0)
            out = norm_silu_cpu.norm_silu(x[:samples], *affine, *WITHOUT, 16, 1e-5, True, 0.3)
            (gradient,) = th.autograd.grad(out, x, weights[:samples])
            ends.append((out[:1].detach(), gradient[:1]))
    finally:
        th.set_num_threads(threads)
    for out, gradient in ends[1:]:
        assert th.equal(out, ends[0][0]) and th.equal(gradient, ends[0][1])


@needs_compiler
@pytest.mark.parametrize("channels", [64, 20])
def test_what_the_kernel_drops(channels):
    x = th.randn(4, channels, 32, 32).contiguous(memory_format=th.channels_last).requires_grad_()
    th.manual_seed(0)
    dropped, again, whole = (
        norm_silu_cpu.norm_silu(x, th.ones(channels), th.zeros(channels), *WITHOUT, 4, 1e-5, True, p)
        for p in (0.3, 0.3, 0.0)
    )
    kept = dropped != 0
    assert not th.equal(kept, again != 0)
    bound = 5 / kept.numel() ** 0.5
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=bound * 0.21**0.5)
    th.testing.assert_close(dropped, whole * kept / 0.7, rtol=1e-4, atol=0)
    in_memory = kept.permute(0, 2, 3, 1).flatten().float() - 0.7
    for lag in (1, 2, 4, 8, 16, 128, channels, 1024 * channels):  # bits of a draw, draws, positions, samples
        assert abs(float((in_memory[lag:] * in_memory[:-lag]).mean())) < 0.21 * bound
    weights = th.randn_like(x)
    ours, exact = (th.autograd.grad(out, x, weights)[0] for out in (dropped, whole * kept / 0.7))
    th.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    th.manual_seed(0)
    same = norm_silu_cpu.norm_silu(x, th.ones(channels), th.zeros(channels), *WITHOUT, 4, 1e-5, True, 0.3)
    assert th.equal(same, dropped)


@needs_compiler
@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_the_kernel_hides_nothing_that_is_not_finite(dtype):
    for value in (float("nan"), float("inf"), -float("inf")):
        x = th.randn(2, 8, 4, 4).contiguous(memory_format=th.channels_last).to(dtype)
        x[0, 0, 1, 1] = value
        out = norm_silu_cpu.norm_silu(x, th.ones(8), th.zeros(8), *WITHOUT, 4, 1e-5, True, 0.0)
        assert out[0, :2].isnan().all() and out[0, 2:].isfinite().all() and out[1].isfinite().all()


@needs_compiler
def test_the_kernel_whatever_the_defaults_and_whoever_keeps_its_input():
    x = th.randn(4, 64, 8, 8).contiguous(memory_format=th.channels_last).requires_grad_()
    weights, affine = th.randn_like(x), (th.ones(64), th.zeros(64))

    def gradient():
        th.manual_seed(0)
        out = norm_silu_cpu.norm_silu(x, *affine, *WITHOUT, 32, 1e-5, True, 0.3)
        return th.autograd.grad(out, x, weights)[0]

    plain = gradient()
    th.set_default_dtype(th.bfloat16)
    try:
        assert th.equal(gradient(), plain)
    finally:
        th.set_default_dtype(th.float32)
    with th.device("meta"):
        assert th.equal(gradient(), plain)
    with th.autograd.graph.saved_tensors_hooks(lambda kept: kept.detach().numpy().copy("C"), th.from_numpy):
        assert th.equal(gradient(), plain)
    empty = x[:0].detach().requires_grad_()
    out = norm_silu_cpu.norm_silu(empty, *affine, *WITHOUT, 32, 1e-5, True, 0.3)
    assert out.shape == (0, 64, 8, 8) and th.autograd.grad(out.sum(), empty)[0].shape == out.shape


@needs_compiler
def test_the_kernel_far_from_zero():
    x = th.linspace(-1, 1, 64).view(1, 1, 8, 8).contiguous(memory_format=th.channels_last).requires_grad_()
    for gain in (10.0, 1e3, 1e30):
        out = norm_silu_cpu.norm_silu(x, th.tensor([gain]), th.zeros(1), *WITHOUT, 1, 1e-5, True, 0.0)
        h = gain * F.group_norm(x, 1)
        th.testing.assert_close(out, F.silu(h), rtol=1e-5, atol=1e-6 * gain)
        assert th.autograd.grad(out.sum(), x)[0].isfinite().all()


@needs_compiler
def test_what_is_compiled_is_kept_for_the_next_time(tmp_path, monkeypatch):
    source = tmp_path / "seven.c"
    source.write_text("int seven(void) { return 7; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: runs.append(args) or run(*args, **more))
    for _ in range(2):
        assert native.compiled(source).seven() == 7
    (kept,) = (tmp_path / "cache/tccd").iterdir()
    assert kept.name.startswith("seven-") and len(runs) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other/tccd" / kept.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(kept.read_bytes()[:5000])  # to load it would be a bus error
    assert native.compiled(source).seven() == 7 and len(runs) == 2
    assert damaged.read_bytes() == kept.read_bytes()
    source.write_text("int seven(void) { return 6 + 1; }\n")
    assert native.compiled(source).seven() == 7 and len(runs) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # no folder can be made there
    assert native.compiled(source).seven() == 7 and len(runs) == 4


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", f"{sys.executable} -c pass --"])
def test_without_a_compiler_torchs_kernels_normalise(compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    norm_silu_cpu._library.cache_clear()
    nn.norm_kernel.cache_clear()
    try:
        norm, x = random_norm(), th.randn(3, 8, 4, 4).contiguous(memory_format=th.channels_last)
        scale, shift = th.randn(3, 8), th.randn(3, 8)
        for _ in range(2):
            th.testing.assert_close(norm(x, scale, shift, silu=True), plain(norm, x, scale, shift))
    finally:
        norm_silu_cpu._library.cache_clear()
        nn.norm_kernel.cache_clear()
    assert capsys.readouterr().err.count("WARNING: the C compiler does not work here (") == 1


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
