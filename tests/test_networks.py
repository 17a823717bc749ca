"""Networks beyond the golden cases: narrow widths, checkpointing, 16-bit arithmetic, misuse."""

import pytest
import torch as th
from tiny import denoiser, network, randomise

from guided_diffusion.config.adm_diffusers import group_count
from guided_diffusion.errors import UserError
from guided_diffusion.networks.noise_encoder import NoiseEncoder
from guided_diffusion.nn import GroupNorm32, timestep_embedding
from guided_diffusion.respace import space_timesteps
from guided_diffusion.script_util import build_network, create_model


@pytest.mark.parametrize(
    "widths, groups", [((64, 128), 32), ((96, 192), 32), ((32,), 32), ((16, 32), 4), ((8, 16), 2), ((6,), 1)]
)
def test_groups(widths, groups):
    assert group_count(*widths) == groups
    assert all(width % groups == 0 for width in widths)


def test_every_published_width_has_32_groups():
    with th.device("meta"):
        model = create_model(32, 64, 3, channel_mult="", attention_resolutions="16,8", num_head_channels=32)
    assert {m.num_groups for m in model.modules() if isinstance(m, GroupNorm32)} == {32}


def test_a_narrow_network_runs():
    model, _ = build_network(denoiser(**network(16, channels=16)))
    randomise(model)(th.randn(2, 3, 16, 16), th.tensor([0, 19])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_recomputation_changes_nothing():
    results = []
    for use_checkpoint in (False, True):
        th.manual_seed(0)
        model, _ = build_network(
            denoiser(**network(8, attention_resolutions="4", use_checkpoint=use_checkpoint))
        )
        randomise(model)
        output = model(th.linspace(-1, 1, 384).reshape(2, 3, 8, 8), th.tensor([3, 7]))
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        th.testing.assert_close(plain, recomputed)


def test_dropout_is_of_training_alone():
    model = randomise(build_network(denoiser(**network(8, attention_resolutions="4", dropout=0.5)))[0])
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 7])
    model.eval()
    assert th.equal(model(x, t), model(x, t))
    model.train()
    assert not th.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16])
def test_sixteen_bits_stay_close_and_parameters_stay_float32(dtype):
    model, _ = build_network(denoiser(**network(16)))
    randomise(model)
    x, t = th.randn(2, 3, 16, 16), th.tensor([3, 7])
    exact = model(x, t).detach()
    model.use_dtype(dtype)
    rough = model(x, t).detach()
    assert rough.dtype == th.float32
    assert {p.dtype for p in model.parameters()} == {th.float32}
    error = float((rough - exact).norm() / exact.norm())
    assert 0 < error < (0.03 if dtype is th.bfloat16 else 0.004)


def test_labels_are_given_if_and_only_if_wanted():
    plain, _ = build_network(denoiser(**network(16)))
    conditional, _ = build_network(denoiser(**network(16, class_cond=True, num_classes=3)))
    x, t, y = th.randn(2, 3, 16, 16), th.tensor([3, 7]), th.tensor([0, 2])
    with pytest.raises(ValueError, match="class labels"):
        plain(x, t, y)
    with pytest.raises(ValueError, match="class labels"):
        conditional(x, t)
    randomise(conditional)
    assert not th.equal(conditional(x, t, y), conditional(x, t, y.flip(0)))


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"num_head_channels": 24}, "num_head_channels 24 does not divide"),
        ({"num_heads": 3}, "num_heads 3 does not divide"),
        ({"num_heads": -1}, "num_heads -1 does not divide"),
        ({"channel_mult": ""}, "image_size 16 has no default channel_mult"),
        ({"channel_mult": "1,2,2,2,2,2"}, "cannot be halved 5 times"),
        ({"timestep_respacing": "ddim8"}, "no integer stride"),
        ({"channel_mult": "1e30"}, "student: "),
        ({"timestep_respacing": "x"}, "timestep_respacing 'x'"),
    ],
)
def test_sizes_that_do_not_fit_are_told(keys, told):
    with pytest.raises(UserError) as error:
        build_network(denoiser(**network(16, **keys)), "student.")
    assert told in str(error.value)
    assert "student" in str(error.value)


def test_heads_are_checked_where_there_is_attention():
    """Which is where maps are halved image_size // S fold, also if no map is of the size S."""
    keys = {"num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "16", "image_size": 24}
    network = create_model(**keys, num_res_blocks=1, num_head_channels=32)
    with th.no_grad():
        assert network.eval()(th.randn(1, 3, 24, 24), th.zeros(1)).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="num_head_channels 64 does not divide the attention width 32"):
        create_model(**keys, num_res_blocks=1, num_head_channels=64)


def test_one_step_may_be_left_of_any_number():
    assert space_timesteps(1000, "ddim1") == {0} and space_timesteps(1, "ddim1") == {0}


def test_heads_on_the_way_up_are_those_of_its_own_attention_alone():
    keys = {"channel_mult": "3,4", "num_res_blocks": 1, "attention_resolutions": "32", "num_heads": 2}
    network = create_model(32, num_channels=32, num_heads_upsample=3, **keys)
    with th.no_grad():
        assert network.eval()(th.randn(1, 3, 32, 32), th.zeros(1)).shape == (1, 3, 32, 32)


def test_the_timestep_embedding_puts_cosines_first():
    emb = timestep_embedding(th.tensor([0, 1]), 7)
    assert emb.shape == (2, 7)
    assert th.equal(emb[0], th.tensor([1.0, 1, 1, 0, 0, 0, 0]))
    assert emb[1, 0] == pytest.approx(0.5403, abs=1e-4) and emb[1, 3] == pytest.approx(0.8415, abs=1e-4)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_noise_encoder_has_16_patches_at_every_size(size):
    encoder = NoiseEncoder((8, size, size), dim=24)
    flatten = encoder.to_patch_embedding[0]
    h = th.arange(8 * size * size, dtype=th.float32).reshape(1, 8, size, size)
    patches = flatten(h)
    p = size // 4
    assert patches.shape == (1, 16, p * p * 8)
    assert th.equal(patches[0, 1, :8], h[0, :, 0, p])  # the second patch is to the right; channels innermost
    assert encoder(h).shape == (1, 24)


@pytest.mark.parametrize(
    "size, patch, count",
    [((18, 18), 5, 16), ((7, 7), 2, 16), ((5, 5), 2, 9), ((2, 2), 1, 4), ((8, 6), 2, 12)],
)
def test_the_noise_encoder_covers_maps_of_any_size(size, patch, count):
    """Every position reaches z."""
    encoder = NoiseEncoder((3, *size), dim=24)
    h = th.randn(2, 3, *size, requires_grad=True)
    patches = encoder.to_patch_embedding[0](h)
    assert patches.shape == (2, count, patch * patch * 3)
    assert float(patches.detach().sum()) == pytest.approx(float(h.detach().sum()), abs=1e-3)
    encoder(h).square().sum().backward()
    assert h.grad.abs().amin() > 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    keys = network(16, channel_mult="1", attention_resolutions="16")
    plain, compiled = (randomise(build_network(denoiser(**keys))[0]) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks(backend="aot_eager")  # all of compiling but the minutes of the code generator
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for size in (2, 3):  # another batch size
        x, t = th.randn(size, 3, 16, 16), th.arange(size)
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            output = model(x, t)
            output.square().mean().backward()
            results.append((output.detach(), [p.grad for p in model.parameters()]))
        th.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
        with th.no_grad():
            th.testing.assert_close(compiled(x, t), results[0][0], atol=1e-6, rtol=1e-4)
    compiled_blocks = [m for m in compiled.modules() if m._compiled_call_impl is not None]
    assert len(compiled_blocks) == 9
