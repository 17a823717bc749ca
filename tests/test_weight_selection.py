"""A student's first weights, selected from its teacher's: channels that belong together, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch as th
from in_process import script_here
from tiny import denoiser, distillation, give_student_dit_keys, network, one_line_error, randomise, script

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.networks.adm_weights import attention_blocks
from guided_diffusion.networks.diffusers_unet2d import DiffusersUNet2D
from guided_diffusion.networks.weight_selection import selected
from guided_diffusion.runs.checkpoint import load_network, load_state_dict
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
    found = other.from_diffusers(selected(large.unet2d_weights(), other.unet2d_weights()))
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
    weights = selected(large.unet2d_weights(), small.unet2d_weights())
    name = "mid_block.resnets.0.conv1.weight"
    full = large.unet2d_weights().state[name]
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
    weights = selected(large.unet2d_weights(), small.unet2d_weights())
    assert th.equal(weights["time_proj.weight"], large.unet2d_weights().state["time_proj.weight"][:, ::2])


@pytest.mark.parametrize("kind", KINDS)
@th.no_grad()
def test_the_whole_of_a_network_is_that_network(kind):
    one = build(32, **KINDS[kind])
    exported = one.for_diffusers() if kind != "classes, three levels" else None
    state = selected(one.unet2d_weights(), one.unet2d_weights())
    found = one.from_diffusers(state)
    assert all(th.equal(found[name], value) for name, value in one.state_dict().items())
    if exported is not None:  # a diffusers student of an ADM teacher
        theirs = DiffusersUNet2D(exported.config).eval()
        theirs.load_state_dict(selected(one.unet2d_weights(), theirs.unet2d_weights()))
        given = inputs(one)
        th.testing.assert_close(theirs(*given), one(*given), rtol=1e-4, atol=1e-5)
        back = selected(theirs.unet2d_weights(), one.unet2d_weights())
        assert all(th.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "blocks, down, up", [(3, [0, 1, 2], [0, 1, 2, 3]), (2, [0, 2], [0, 2, 3]), (1, [0], [0, 3])]
)
@th.no_grad()
def test_blocks_stay_with_those_whose_maps_they_read(blocks, down, up):
    """The last on the way down and the first on the way up, the first down and the last up."""
    large, small = build(32, num_res_blocks=3), build(32, num_res_blocks=blocks)
    weights = selected(large.unet2d_weights(), small.unet2d_weights())
    for side, chosen in (("down", down), ("up", up)):
        for level in range(2):
            for number, theirs in enumerate(chosen):
                for part in ("resnets.{}.conv2.bias", "attentions.{}.to_out.0.bias"):
                    name, source = (
                        f"{side}_blocks.{level}.{part}".format(index) for index in (number, theirs)
                    )
                    if name in weights:
                        assert th.equal(weights[name], large.unet2d_weights().state[source])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_distillation_starts_from_the_selected_weights(tmp_path, ranks):
    config = distillation(tmp_path, SIZE, distill__initial_weights="teacher", student__num_channels=16)
    more = ["student.save_interval=1", "run.iterations=2", "student.ema_rate=0.9"]
    script_here("scripts/dynamic_prepare.py", "--config", config)
    kd = ["scripts/image_kd.py", "--config", config, *more]
    script(*kd, "student.lr=1e-30", "--exp_dir", tmp_path / "first", ranks=ranks)
    experiment = load_experiment(config)
    (teacher, _), (student, _) = build_network(experiment.teacher), build_network(experiment.student)
    load_network(teacher, tmp_path / "teacher.pt")
    wanted = student.from_diffusers(selected(teacher.unet2d_weights(), student.unet2d_weights()))
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
        ("student.num_heads=8", "does not cover"),
        ("student.use_scale_shift_norm=false", "time_emb_proj.weight (64, 128) does not cover"),
        ("student.channel_mult=1", "the larger network has 2 levels, the smaller 1"),
        ("student.num_res_blocks=2", "fewer blocks in down_blocks.0"),
        ("student.attention_resolutions=8,4", "has no down_blocks.0.attentions.0"),
        ("student.architecture=dit", "DiT is no U-Net of ADM's or diffusers' kind"),
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


@th.no_grad()
def test_groups_of_a_normalisation_stay_together():
    large, small = build(16, channel_mult="1,2"), build(8, channel_mult="1,2", num_heads=1)
    ours, theirs = small.unet2d_weights(), large.unet2d_weights()
    assert (theirs.groups, ours.groups) == (4, 2)  # of four channels each, in the first level
    norm = "down_blocks.0.resnets.0.norm1.weight"
    th.nn.init.normal_(theirs.state[norm])
    groups = theirs.state[norm].unflatten(0, (4, 4))
    assert th.equal(selected(theirs, ours)[norm], groups[::2].flatten())
