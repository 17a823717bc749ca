"""A student's initial weights, selected from its teacher's: channels that belong together, refusals."""

import shutil
from pathlib import Path

import pytest
import torch as th
import yaml
from in_process import script_here
from tiny import (
    ROOT,
    denoiser,
    distillation,
    give_student_dit_keys,
    make_teacher,
    network,
    one_line_error,
    randomise,
    script,
)

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.networks.adm_weights import attention_blocks
from guided_diffusion.networks.diffusers_unet2d import DiffusersUNet2D
from guided_diffusion.networks.weight_selection import bottleneck_channels, selected
from guided_diffusion.runs.weights import load_network, load_state_dict
from guided_diffusion.script_util import build_network

SIZE = 8


def build(channels, **more):
    th.manual_seed(channels)
    return randomise(build_network(denoiser(**network(SIZE, channels, **more)))[0]).eval()


def doubled(small, large):
    """A network of twice the width that computes the same: every channel is there twice, and counts half."""
    weights = {}
    for name, value in small.state_dict().items():
        wanted = large.state_dict()[name].shape
        halves = value.ndim > 1 and wanted[1] == 2 * value.shape[1] and name != "label_emb.weight"
        if name == "time_embed.0.weight":  # no channels, but frequencies: every second one is the small one's
            wide = value.new_zeros(value.shape[0], wanted[1])
            wide[:, ::2] = value
            value = wide.repeat_interleave(2, 0)
        else:
            for dim, size in enumerate(value.shape):
                value = value.repeat_interleave(wanted[dim] // size, dim)
            value = value / 2 if halves else value
        weights[name] = value
    large.load_state_dict(weights)
    for block in attention_blocks(large).values():  # products of queries and keys have twice the terms
        for parameter in (block.qkv.weight, block.qkv.bias):
            packed = (3, block.num_heads) if block.new_order else (block.num_heads, 3)
            parts = parameter.data.unflatten(0, (*packed, -1)).movedim(0 if block.new_order else 1, 0)
            parts[:2] *= 2**-0.25
    return large


def inputs(net):
    x, t = th.randn(5, *net.shape), th.tensor([0, 3, 8, 12, 19])
    return (x, t) if net.num_classes is None else (x, t, t % net.num_classes)


KINDS = {
    "scale and shift": {},
    "added": {"use_scale_shift_norm": False, "resblock_updown": False, "use_new_attention_order": True},
    "classes, three levels": {"class_cond": True, "num_classes": 3, "channel_mult": "1,1,2"},
}


@pytest.mark.parametrize("kind", KINDS)
@th.no_grad()
def test_channels_that_belong_together_are_selected(kind):
    """Of a network with every channel twice, one of each pair, wherever maps are joined, packed or split."""
    small, other = build(32, **KINDS[kind]), build(32, **KINDS[kind])
    large = doubled(small, build(64, **KINDS[kind]))
    given = inputs(small)
    th.testing.assert_close(large(*given), small(*given), rtol=1e-4, atol=1e-4)
    other.load_state_dict({name: th.randn_like(value) for name, value in small.state_dict().items()})
    found = other.from_diffusers(selected(large.selectable_weights(), other.selectable_weights()))
    assert found.keys() == small.state_dict().keys()
    for name, value in small.state_dict().items():
        parts = [(found[name], value)]
        if ".qkv." in name:  # the values are not those that were scaled
            block = attention_blocks(small)[name.partition(".qkv")[0]]
            shape = (3, block.num_heads, -1) if block.new_order else (block.num_heads, 3, -1)
            three = [
                v.unflatten(0, shape).movedim(0 if block.new_order else 1, 0) for v in (found[name], value)
            ]
            parts = list(zip(*three, strict=True))
        for ours, theirs in parts:
            th.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=1e-4, atol=1e-5)


@th.no_grad()
def test_outputs_keep_their_size():
    large, small = build(64), build(32)
    weights = selected(large.selectable_weights(), small.selectable_weights())
    name = "mid_block.resnets.0.conv1.weight"
    full = large.selectable_weights().state[name]
    assert weights[name].shape[1] == full.shape[1] / 2
    th.testing.assert_close(weights[name], full[::2, ::2] * 2**0.5)


def test_rows_of_a_table_sum_over_nothing():
    """Learned timesteps, [T, C]: channels are selected, and their size stays."""
    keys = {"architecture": "diffusers_unet2d", "image_size": SIZE, "norm_num_groups": 4}
    keys |= {"down_block_types": "DownBlock2D,DownBlock2D", "up_block_types": "UpBlock2D,UpBlock2D"}
    keys |= {"time_embedding_type": "learned", "num_train_timesteps": 20}
    large, small = (
        build_network(denoiser(**keys, block_out_channels=f"{width},{width}"))[0] for width in (32, 16)
    )
    weights = selected(large.selectable_weights(), small.selectable_weights())
    assert th.equal(weights["time_proj.weight"], large.selectable_weights().state["time_proj.weight"][:, ::2])


def unet2d(width, **more):
    """A U-Net of diffusers' that, but for these keys, is one of ADM's."""
    keys = {"architecture": "diffusers_unet2d", "image_size": SIZE, "learn_sigma": True}
    keys |= {"down_block_types": "DownBlock2D,DownBlock2D", "up_block_types": "UpBlock2D,UpBlock2D"}
    keys |= {"norm_num_groups": 4, "layers_per_block": 1, "block_out_channels": f"{width},{width}"}
    return build_network(denoiser(**keys | more))[0]


CONVENTIONS = {"flip_sin_to_cos": False, "freq_shift": 1.0, "downsample_padding": 0, "act_fn": "gelu"}
CONVENTIONS |= {"center_input_sample": True, "mid_block_scale_factor": 1.4}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_weights_that_are_read_otherwise_are_not_selected(name):
    """They would load, into a network that computes something else."""
    theirs = unet2d(32, **{name: CONVENTIONS[name]}).selectable_weights()
    assert selected(theirs, unet2d(16, **{name: CONVENTIONS[name]}).selectable_weights())
    adm = build(16, channel_mult="1,1", attention_resolutions="", use_scale_shift_norm=False)
    for smaller in (adm, unet2d(16)):
        with pytest.raises(ValueError, match=f"the larger network's {name} is {CONVENTIONS[name]}, the smal"):
            selected(theirs, smaller.selectable_weights())
    assert len(bottleneck_channels(theirs, unet2d(16).selectable_weights())) == 16  # which moves no weights


def test_a_bottleneck_of_other_levels_is_not_matched():
    deeper = build(64, channel_mult="1,1,2").selectable_weights()
    with pytest.raises(ValueError, match="the larger network has 3 levels, the smaller 2"):
        bottleneck_channels(deeper, build(32).selectable_weights())


def test_swish_is_silu():
    one, other = (unet2d(16, act_fn=name).selectable_weights() for name in ("swish", "silu"))
    assert selected(one, other) and selected(other, one)


@th.no_grad()
def test_a_learned_table_of_timesteps_is_selected_as_what_reads_it():
    """Whatever the groups of the normalisations are."""
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 20}
    large, small = unet2d(32, norm_num_groups=8, **learned), unet2d(16, norm_num_groups=4, **learned)
    large.model.time_proj.weight.copy_(th.arange(32.0).expand(20, -1))
    large.model.time_embedding.linear_1.weight.copy_(th.arange(32.0).expand(128, -1))
    found = selected(large.selectable_weights(), small.selectable_weights())
    written, read = found["time_proj.weight"][0], found["time_embedding.linear_1.weight"][0] / 2**0.5
    th.testing.assert_close(written, read)


def test_a_block_that_changes_the_channels_has_no_counterpart_that_does_not():
    with pytest.raises(ValueError, match=r"down_blocks.1.resnets.0 changes the number of channels, down_bl"):
        selected(build(64).selectable_weights(), build(32, channel_mult="1,1").selectable_weights())


@pytest.mark.parametrize("kind", KINDS)
@th.no_grad()
def test_the_whole_of_a_network_is_that_network(kind):
    one = build(32, **KINDS[kind])
    exported = one.for_diffusers() if kind != "classes, three levels" else None
    state = selected(one.selectable_weights(), one.selectable_weights())
    found = one.from_diffusers(state)
    assert all(th.equal(found[name], value) for name, value in one.state_dict().items())
    if exported is not None:  # a diffusers student of an ADM teacher
        theirs = DiffusersUNet2D(exported.config).eval()
        theirs.load_state_dict(selected(one.selectable_weights(), theirs.selectable_weights()))
        given = inputs(one)
        th.testing.assert_close(theirs(*given), one(*given), rtol=1e-4, atol=1e-5)
        back = selected(theirs.selectable_weights(), one.selectable_weights())
        assert all(th.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "blocks, down, up", [(3, [0, 1, 2], [0, 1, 2, 3]), (2, [0, 2], [0, 2, 3]), (1, [0], [0, 3])]
)
@th.no_grad()
def test_blocks_stay_with_those_whose_maps_they_read(blocks, down, up):
    """The last on the way down and the first on the way up, the first down and the last up."""
    large, small = build(32, num_res_blocks=3), build(32, num_res_blocks=blocks)
    weights = selected(large.selectable_weights(), small.selectable_weights())
    for side, chosen in (("down", down), ("up", up)):
        for level in range(2):
            for number, theirs in enumerate(chosen):
                for part in ("resnets.{}.conv2.bias", "attentions.{}.to_out.0.bias"):
                    name, source = (
                        f"{side}_blocks.{level}.{part}".format(index) for index in (number, theirs)
                    )
                    if name in weights:
                        assert th.equal(weights[name], large.selectable_weights().state[source])


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_distillation_starts_from_the_selected_weights(tmp_path, ranks):
    config = distillation(tmp_path, SIZE, distill__initial_weights="teacher", student__num_channels=16)
    more = ["student.save_interval=1", "run.iterations=2", "student.ema_rate=0.9"]
    script_here("scripts/dynamic_prepare.py", "--config", config)
    kd = ["scripts/image_kd.py", "--config", config, *more]
    script(*kd, "student.lr=1e-30", "--exp_dir", tmp_path / "first", ranks=ranks)
    experiment = load_experiment(config)
    (teacher, _), (student, _) = build_network(experiment.teacher), build_network(experiment.student)
    load_network(teacher, tmp_path / "teacher.pt")
    wanted = student.from_diffusers(selected(teacher.selectable_weights(), student.selectable_weights()))
    found = load_state_dict(tmp_path / "first/model000001.pt")
    for name, value in wanted.items():
        th.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    if ranks == 1:  # what goes on has its own weights already
        script_here(*kd, "--exp_dir", tmp_path / "whole")
        resume = ["--resume_checkpoint", tmp_path / "whole/model000001.pt", "--exp_dir", tmp_path / "again"]
        script_here(*kd, *resume)
        one, two = (load_state_dict(tmp_path / run / "model000002.pt") for run in ("whole", "again"))
        assert all(th.equal(one[name], two[name]) for name in one)


def test_a_student_that_predicts_v_has_its_own_last_layer(tmp_path):
    config = distillation(tmp_path, SIZE, distill__initial_weights="teacher", student__num_channels=16)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    once = ["run.iterations=1", "student.save_interval=1", "student.lr=1e-30"]
    found = {}
    for kind in ("epsilon", "v_prediction"):
        more = [*once, f"student.prediction_type={kind}", "--exp_dir", tmp_path / kind]
        script_here("scripts/image_kd.py", "--config", config, *more)
        found[kind] = load_state_dict(tmp_path / kind / "model000001.pt")
    for name, theirs in found["epsilon"].items():
        ours = found["v_prediction"][name]
        if name.startswith("out.2."):  # eps or v, then the variance
            assert theirs[:3].abs().max() > 1e-3 > ours[:3].abs().max()
            theirs, ours = theirs[3:], ours[3:]
        th.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "override, told",
    [
        ("student.num_channels=64", "does not cover"),
        ("student.num_heads=8", "parts, such as heads, and "),
        ("student.use_scale_shift_norm=false", "one of them has use_scale_shift_norm, the other has not"),
        ("student.channel_mult=1", "the larger network has 2 levels, the smaller 1"),
        ("student.num_res_blocks=2", "fewer blocks in down_blocks.0"),
        ("student.attention_resolutions=8,4", "has no down_blocks.0.attentions.0"),
        ("student.architecture=dit", "the two networks are of different kinds"),
        ("distill.initial_weights=mine", "must be random or teacher, not 'mine'"),
    ],
)
def test_students_that_cannot_start_there_are_refused(prepared_at_8, tmp_path, override, told):
    config = Path(shutil.copy(prepared_at_8, tmp_path))
    if override.endswith("dit"):
        give_student_dit_keys(config, SIZE)
    flags = ["--config", config, "--exp_dir", tmp_path / "run", "distill.initial_weights=teacher", override]
    done = script_here("scripts/image_kd.py", *flags, check=False)
    assert told in one_line_error(done)


def transformer(heads, **more):
    keys = {"image_size": SIZE, "learn_sigma": True, "num_attention_heads": heads, "attention_head_dim": 8}
    keys |= {"num_layers": 2, "class_cond": True, "num_classes": 3, "diffusion_steps": 20}
    keys |= {"noise_schedule": "cosine"}
    th.manual_seed(heads)
    return randomise(build_network(denoiser(architecture="dit", **keys | more))[0]).eval()


def doubled_transformer(small, large):
    """A DiT of twice the width that computes the same: every channel is there twice, and counts half."""
    large.model.pos_embed.pos_embed = small.model.pos_embed.pos_embed.repeat_interleave(2, -1)
    for name, value in small.state_dict().items():
        wanted = large.state_dict()[name]
        halves = value.ndim == 2 and wanted.shape[1] == 2 * value.shape[1] and "table" not in name
        for dim, size in enumerate(value.shape):
            value = value.repeat_interleave(wanted.shape[dim] // size, dim)
        scale = 2**-0.25 if ".to_q." in name or ".to_k." in name else 1  # products have twice the terms
        wanted.copy_(value * scale / (2 if halves else 1))
    return large


@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
@th.no_grad()
def test_channels_of_a_transformer_that_belong_together_are_selected(activation):
    small, other = (transformer(2, activation_fn=activation) for _ in range(2))
    large = transformer(2, attention_head_dim=16, activation_fn=activation)
    doubled_transformer(small, large)
    given = inputs(small)
    th.testing.assert_close(large(*given), small(*given), rtol=1e-4, atol=1e-4)
    found = selected(large.selectable_weights(), other.selectable_weights())
    assert found.keys() == small.state_dict().keys()
    for name, value in small.state_dict().items():
        th.testing.assert_close(found[name] / found[name].norm(), value / value.norm(), rtol=1e-4, atol=1e-5)


@th.no_grad()
def test_a_smaller_transformer_has_whole_heads_the_first_blocks_and_the_same_positions():
    large, small = transformer(4), transformer(2, num_layers=1)
    weights, theirs = selected(large.selectable_weights(), small.selectable_weights()), large.state_dict()
    assert not any("blocks.1." in name for name in weights)
    name = "transformer_blocks.0.attn1.to_v"
    heads = theirs[f"{name}.weight"].unflatten(0, (4, 8))[::2].flatten(0, 1)
    th.testing.assert_close(weights[f"{name}.weight"], heads[:, ::2] * 2**0.5)
    assert th.equal(weights[f"{name}.bias"], theirs[f"{name}.bias"].unflatten(0, (4, 8))[::2].flatten())
    positions = large.model.pos_embed.pos_embed[..., ::2]  # sines and cosines, not learned
    th.testing.assert_close(positions, small.model.pos_embed.pos_embed)
    whole = selected(large.selectable_weights(), transformer(4).selectable_weights())
    assert all(th.equal(whole[name], value) for name, value in theirs.items())


@th.no_grad()
def test_a_transformer_with_fixed_variances_has_the_means_of_each_pixel():
    large, small = transformer(2), transformer(2, learn_sigma=False)
    weights = selected(large.selectable_weights(), small.selectable_weights())
    rows = large.state_dict()["proj_out_2.bias"].unflatten(0, (4, 6))[:, :3]  # patches of 2 x 2
    assert th.equal(weights["proj_out_2.bias"], rows.flatten())
    assert (
        large.selectable_weights().mean_rows().unflatten(0, (4, 6)).tolist() == [[True] * 3 + [False] * 3] * 4
    )


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"patch_size": 4}, "patches of 2 pixels, the smaller of 4"),
        ({"num_layers": 3}, "has no transformer_blocks.2"),
        ({"num_attention_heads": 4}, "does not cover"),
    ],
)
def test_transformers_that_are_somewhere_larger_are_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        selected(transformer(2).selectable_weights(), transformer(2, **keys).selectable_weights())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_transformer_is_distilled_by_the_plus_preset(tmp_path, kind):
    """From a DiT to a smaller one, without the U-Nets' bottleneck; one that predicts v has its last layer."""
    keys = {"architecture": "dit", "image_size": SIZE, "learn_sigma": True, "diffusion_steps": 20}
    keys |= {"noise_schedule": "cosine"}
    teacher = keys | {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
    teacher |= {"model_path": str(tmp_path / "teacher.pt"), "tempfile": str(tmp_path / "pool.cache")}
    teacher |= {"iter_choice": "dynamic_iterative_distillation", "BATCH": 0.4, "batch_size": 6}
    student = keys | {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "batch_size": 4}
    student |= {"prediction_type": kind, "save_interval": 1, "lr": 1e-30}
    config = {"base": str(ROOT / "yaml/preset/tccd-plus.yaml"), "teacher": teacher, "student": student}
    config |= {"distill": {"bottleneck_weight": 0}, "run": {"iterations": 1, "sample_interval": -1}}
    path = tmp_path / "dit.yaml"
    path.write_text(yaml.safe_dump(config))
    experiment = load_experiment(path)
    make_teacher(experiment.teacher, tmp_path / "teacher.pt")
    script_here("scripts/dynamic_prepare.py", "--config", path)
    script_here("scripts/image_kd.py", "--config", path, "--exp_dir", tmp_path / "run")
    found = load_state_dict(tmp_path / "run/model000001.pt")
    theirs, ours = (build_network(part)[0] for part in (experiment.teacher, experiment.student))
    load_network(theirs, tmp_path / "teacher.pt")
    wanted = selected(theirs.selectable_weights(), ours.selectable_weights())
    mean = ours.selectable_weights().mean_rows()
    for name, value in wanted.items():
        given = found[name]
        if kind != "epsilon" and name.startswith("proj_out_2."):
            assert value[mean].abs().max() > 1e-3 > given[mean].abs().max()
            given, value = given[~mean], value[~mean]
        th.testing.assert_close(given, value, rtol=1e-6, atol=1e-7)


@th.no_grad()
def test_groups_of_a_normalisation_stay_together():
    large, small = build(16, channel_mult="1,2"), build(8, channel_mult="1,2", num_heads=1)
    ours, theirs = small.selectable_weights(), large.selectable_weights()
    assert (theirs.groups, ours.groups) == (4, 2)  # of four channels each, in the first level
    norm = "down_blocks.0.resnets.0.norm1.weight"
    th.nn.init.normal_(theirs.state[norm])
    groups = theirs.state[norm].unflatten(0, (4, 4))
    assert th.equal(selected(theirs, ours)[norm], groups[::2].flatten())
