"""Models of diffusers' as teachers and students, compared with diffusers itself."""

import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from tiny import denoiser, script
from tiny import network as network_keys

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.settings import Process
from guided_diffusion.io.description import read_description
from guided_diffusion.io.diffusers_library import import_diffusers
from guided_diffusion.runs.weights import load_network, load_state_dict
from guided_diffusion.script_util import build_network

diffusers = import_diffusers("the tests")
DDPMPipeline, DDPMScheduler, DDIMScheduler = (
    diffusers.DDPMPipeline,
    diffusers.DDPMScheduler,
    diffusers.DDIMScheduler,
)
UNet2DModel, DiTTransformer2DModel = diffusers.UNet2DModel, diffusers.DiTTransformer2DModel
T = 20
SCHEDULE = {"num_train_timesteps": T, "beta_start": 0.001, "beta_end": 0.3}


@th.no_grad()
def scramble(model):
    """Random values everywhere, also where diffusers begins with zeros or ones."""
    th.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(th.randn_like(parameter) * 0.05)
    return model.eval()


def unet(**more):
    """Of the kind of google/ddpm-cifar10-32, which ADM's U-Net is not."""
    keys = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
    }
    return scramble(UNet2DModel(**keys | more))


def adm_unet(**more):
    """One that ADM's U-Net is."""
    keys = {
        "norm_num_groups": 4,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "attention_head_dim": 8,
    }
    return unet(**keys | more)


def dit(**more):
    keys = {
        "sample_size": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "in_channels": 3,
        "num_embeds_ada_norm": 1,
    }
    return scramble(DiTTransformer2DModel(**keys | more))


def save(path, model, scheduler=None, pipeline=None):
    """A pipeline's folder as diffusers writes it, or the network's alone."""
    part = "unet" if isinstance(model, UNet2DModel) else "transformer"
    if scheduler is None:
        model.save_pretrained(path)
        return path
    if part == "unet" and pipeline is None:
        DDPMPipeline(model, scheduler).save_pretrained(path)
        return path
    model.save_pretrained(path / part)
    scheduler.save_pretrained(path / "scheduler")
    index = {"_class_name": pipeline or "DiTPipeline", part: ["diffusers", type(model).__name__]}
    index |= {"scheduler": ["diffusers", type(scheduler).__name__]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def loaded(path, **keys):
    """The settings, network and process of a configuration that names a folder alone."""
    config = path.parent / f"{path.name}.yaml"
    config.write_text(yaml.safe_dump({"model_path": str(path), **keys}))
    settings = load_experiment(config).student
    network, process = build_network(settings)
    load_network(network, path)
    return settings, network.eval(), process


FORWARD = {
    "cifar10": (unet, {}, "diffusers_unet2d"),
    "learned variance": (unet, {"out_channels": 6}, "diffusers_unet2d"),
    "classes": (unet, {"num_class_embeds": 5, "flip_sin_to_cos": True}, "diffusers_unet2d"),
    "learned times": (unet, {"time_embedding_type": "learned", "num_train_timesteps": T}, "diffusers_unet2d"),
    "no middle": (unet, {"mid_block_type": None}, "diffusers_unet2d"),
    "skips": (
        lambda **k: unet(
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            block_out_channels=(32, 32),
            **k,
        ),
        {},
        "diffusers_unet2d",
    ),
    "scale and shift": (unet, {"resnet_time_scale_shift": "scale_shift"}, "diffusers_unet2d"),
    "adm": (adm_unet, {}, "adm"),
    "adm of one head": (adm_unet, {"attention_head_dim": None}, "adm"),
    "adm with all": (
        adm_unet,
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "block_out_channels": (16, 32, 48),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 4,
            "layers_per_block": 2,
            "out_channels": 6,
            "num_class_embeds": 5,
        },
        "adm",
    ),
    "dit": (dit, {}, "dit"),
    "dit with all": (
        dit,
        {"out_channels": 6, "num_embeds_ada_norm": 5, "attention_bias": False, "activation_fn": "geglu"},
        "dit",
    ),
}


@pytest.mark.parametrize("name", FORWARD)
def test_a_folders_network_is_diffusers_own(tmp_path, name):
    make, keys, architecture = FORWARD[name]
    model = make(**keys)
    settings, network, _ = loaded(
        save(
            tmp_path / "m",
            model,
            DDPMScheduler(
                **SCHEDULE,
                variance_type=("learned_range" if keys.get("out_channels") == 6 else "fixed_small"),
            ),
        )
    )
    assert settings.architecture.architecture == architecture
    assert settings.architecture.class_cond == (network.num_classes is not None)
    x, t = th.randn(3, 3, 8, 8), th.tensor([0, 7, T - 1])
    y = th.tensor([0, 2, 4]) if settings.architecture.class_cond else None
    labels = th.zeros(3, dtype=th.int64) if y is None and architecture == "dit" else y
    with th.no_grad():
        wanted = model(x, t, class_labels=labels).sample
        ours = network.evaluate(x, t, y)
        th.testing.assert_close(ours.output, wanted, atol=1e-5, rtol=1e-5)
        assert th.equal(network(x, t, y), ours.output)
        shifted = network.evaluate(x, t, y, emb_shift=th.ones(network.emb_dim))
    assert ours.features.shape == (3, *network.feature_shape)
    assert ours.emb.shape == (3, network.emb_dim)
    assert th.equal(shifted.emb, ours.emb) and not th.allclose(shifted.output, ours.output, atol=1e-3)
    if architecture != "adm":
        assert network.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("order", [True, False], ids=["new order", "legacy order"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"resblock_updown": False, "use_scale_shift_norm": False, "num_heads": 1},
        {"class_cond": True, "num_classes": 3, "num_head_channels": 16, "channel_mult": "1,2,3"},
        {"attention_resolutions": "", "channel_mult": "1,1.5"},
    ],
    ids=str,
)
def test_adm_to_diffusers_and_back_bit_for_bit(tmp_path, more, order):
    keys = network_keys(8, 16, **{"attention_resolutions": "4"} | more, use_new_attention_order=order)
    original, _ = build_network(denoiser(**keys))
    scramble(original)
    theirs = original.for_diffusers()
    model = UNet2DModel(**theirs.config)
    model.load_state_dict(theirs.state)
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 19])
    y = th.tensor([0, 2]) if keys.get("class_cond") else None
    with th.no_grad():
        th.testing.assert_close(
            model.eval()(x, t, class_labels=y).sample, original(x, t, y), atol=1e-5, rtol=1e-5
        )
    back = original.from_diffusers(model.state_dict())
    assert back.keys() == original.state_dict().keys()
    assert all(th.equal(value, back[name]) for name, value in original.state_dict().items())
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    settings, again, _ = loaded(save(tmp_path / "m", model, scheduler))
    assert settings.architecture.architecture == "adm"
    with th.no_grad():
        th.testing.assert_close(again(x, t, y), original(x, t, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"num_heads": 2, "channel_mult": "1,2", "attention_resolutions": "8,4"}, "heads are 8 and 16 wide"),
        ({"channel_mult": "2,2"}, "first level is 32 wide, not num_channels 16"),
    ],
)
def test_what_diffusers_cannot_express_is_told(keys, told):
    original, _ = build_network(denoiser(**network_keys(8, 16, **{"attention_resolutions": "4"} | keys)))
    with pytest.raises(ValueError, match=told):
        original.for_diffusers()


PROCESSES = {
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "small": (DDPMScheduler, {"variance_type": "fixed_small", "clip_sample": False}, {}),
    "scaled, v": (DDPMScheduler, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}, {}),
    "cosine, x_0": (
        DDPMScheduler,
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {},
    ),
    "learned": (DDPMScheduler, {"variance_type": "learned_range"}, {"out_channels": 6}),
    "ddim": (DDIMScheduler, {"clip_sample": False}, {}),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_the_chain_is_the_pipelines(tmp_path, name):
    """All steps from equal noise, by diffusers' scheduler and by ours."""
    scheduler_class, keys, network_keys = PROCESSES[name]
    model, scheduler = unet(**network_keys), scheduler_class(**SCHEDULE | keys)
    _, network, process = loaded(save(tmp_path / "m", model, scheduler))
    draws = [th.randn(2, 3, 8, 8) for _ in range(T + 1)]
    scheduler.set_timesteps(T)
    x, ours = draws[0], None
    noise = iter(draws[1:])
    if scheduler_class is DDIMScheduler:
        ours = process.ddim_sample_loop(network, x.shape, noise=x)
    else:
        given = iter(draws)
        ours = process.p_sample_loop(network, x.shape, noise_fn=lambda _: next(given))
    with th.no_grad(), patched_noise(noise):
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
    assert float((ours - x).abs().max() / x.abs().max()) < 1e-4


@contextmanager
def patched_noise(noise):
    """Have diffusers' schedulers draw what is given."""
    module = sys.modules[DDPMScheduler.__module__]
    before, module.randn_tensor = module.randn_tensor, lambda *a, **k: next(noise)
    try:
        yield
    finally:
        module.randn_tensor = before


def teacher_folder(folder, kind):
    model = unet(out_channels=6) if kind == "CNN" else dit(out_channels=6)
    return save(folder / kind, model, DDPMScheduler(**SCHEDULE, variance_type="learned_range"))


STUDENTS = {
    "CNN": {
        "architecture": "diffusers_unet2d",
        "block_out_channels": [16, 16],
        "down_block_types": "DownBlock2D,AttnDownBlock2D",
        "up_block_types": "AttnUpBlock2D,UpBlock2D",
        "norm_num_groups": 4,
    },
    "ViT": {"architecture": "dit", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2},
    "ADM": {
        k: v for k, v in network_keys(8, 16, attention_resolutions="4").items() if k not in vars(Process())
    },
}


def distillation_config(folder, teacher, student, **more):
    """A configuration whose teacher is a folder: it says nothing that the folder says."""
    config = folder / "distil.yaml"
    own = {"lr": 1e-3, "batch_size": 4, "ema_rate": "0.9", "log_interval": 1, "save_interval": 2}
    teacher = {"model_path": str(teacher), "tempfile": str(folder / "pool.cache"), "batch_size": 6}
    run = {"iterations": 4, "sample_interval": -1}
    tree = {"teacher": teacher | more, "student": own | student, "run": run}
    tree["distill"] = {"role_vector": True}
    config.write_text(yaml.safe_dump(tree))
    return config


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", ["CNN", "ViT"])
def test_any_teacher_to_any_student(tmp_path, teacher, student):
    """Prepared, distilled with both stages, resumed exactly, sampled from."""
    config = distillation_config(tmp_path, teacher_folder(tmp_path, teacher), STUDENTS[student])
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["scripts/image_kd.py", "--config", config, "--exp_dir"]
    script_here(
        *flags, tmp_path / "straight", "run.sample_interval=4", "run.num_samples=2", "run.sample_respacing=3"
    )
    script_here(*flags, tmp_path / "run", "run.iterations=2")
    script_here(*flags, tmp_path / "run")
    states = [load_state_dict(tmp_path / run / "model000004.pt") for run in ("straight", "run")]
    assert all(th.equal(value, states[1][name]) for name, value in states[0].items())
    before = [load_state_dict(tmp_path / f"straight/{name}000002.pt") for name in ("model", "ema_0.9_")]
    trained = [name for name, value in states[0].items() if not th.equal(value, before[0][name])]
    still = {name for name in states[0] if name not in trained}
    assert all("class_embedder" in name for name in still), still
    description = read_description(tmp_path / "run/model000004.pt")
    assert description["architecture"]["architecture"] == STUDENTS[student].get("architecture", "adm")
    if student != "ADM":
        settings = load_experiment(config).student
        model = (UNet2DModel if student == "CNN" else DiTTransformer2DModel)(
            **settings.architecture.config(3, 6)
        )
        model.load_state_dict(th.load(tmp_path / "run/model000004.pt", weights_only=True))
    script_here(
        "scripts/image_sample.py", "--config", config, "--model_path", tmp_path / "run/ema_0.9_000004.pt",
        "--num_samples", 3, "--timestep_respacing", 2, "--log_dir", tmp_path / "samples",
    )  # fmt: skip
    with np.load(tmp_path / "samples/samples_3x8x8x3.npz") as samples:
        assert samples["arr_0"].shape == (3, 8, 8, 3)


@pytest.mark.slow
def test_a_folder_teaches_on_two_ranks(tmp_path):
    """Prepared and distilled by `mpiexec -n 2`; stopped and resumed, the same bits."""
    config = distillation_config(tmp_path, teacher_folder(tmp_path, "ViT"), STUDENTS["CNN"])
    script("scripts/dynamic_prepare.py", "--config", config, ranks=2)
    flags = ["scripts/image_kd.py", "--config", config, "--exp_dir"]
    script(*flags, tmp_path / "straight", ranks=2)
    script(*flags, tmp_path / "run", "run.iterations=2", ranks=2)
    done = script(*flags, tmp_path / "run", ranks=2)
    assert "2 rank(s)" in done.stdout and "resumed from step 2" in done.stdout
    states = [load_state_dict(tmp_path / run / "model000004.pt") for run in ("straight", "run")]
    assert all(th.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [unet, dit])
def test_sixteen_bits_stay_close(tmp_path, make, frozen):
    folder = save(tmp_path / "m", make(), DDPMScheduler(**SCHEDULE))
    _, network, _ = loaded(folder)
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    exact = network.evaluate(x, t)
    network.use_dtype(th.bfloat16, frozen=frozen)
    rough = network.evaluate(x, t)
    assert rough.output.dtype == rough.features.dtype == rough.emb.dtype == th.float32
    th.testing.assert_close(rough.emb, exact.emb)
    error = float((rough.output - exact.output).detach().norm() / exact.output.detach().norm())
    assert 0 < error < 0.03
    assert {p.dtype for p in network.parameters()} == ({th.float32, th.bfloat16} if frozen else {th.float32})


@pytest.mark.slow
@pytest.mark.parametrize("make", [unet, dit])
def test_compiled_blocks_give_the_same(tmp_path, make):
    folder = save(tmp_path / "m", make(), DDPMScheduler(**SCHEDULE))
    (_, plain, _), (_, compiled, _) = loaded(folder), loaded(folder)
    compiled.compile_blocks(backend="aot_eager")
    assert any(module._compiled_call_impl is not None for module in compiled.modules())
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    for shift in (None, th.ones(plain.emb_dim), None):
        outputs = [network.evaluate(x, t, emb_shift=shift).output for network in (plain, compiled)]
        th.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_labels_are_dropped_in_training_alone_and_for_all_blocks_alike(tmp_path):
    settings, network, _ = loaded(
        save(tmp_path / "m", dit(num_embeds_ada_norm=3), DDPMScheduler(**SCHEDULE)), class_dropout_prob=0.5
    )
    assert settings.architecture.class_dropout_prob == 0.5
    x, t, y = th.randn(1, 3, 8, 8).expand(64, -1, -1, -1), th.full((64,), 5), th.ones(64, dtype=th.int64)
    with th.no_grad():
        given, null = network(x, t, y)[0], network(x, t, y * 3)[0]  # 3 is the null class
        network.train()
        outputs = network(x, t, y)
    kinds = [[th.allclose(row, kind, atol=1e-5) for row in outputs] for kind in (given, null)]
    assert sum(kinds[0]) + sum(kinds[1]) == 64 and 16 < sum(kinds[1]) < 48


def test_a_transformer_begins_as_the_identity():
    network, _ = build_network(
        denoiser(architecture="dit", image_size=8, num_layers=2, num_attention_heads=2)
    )
    out = network.evaluate(th.randn(2, 3, 8, 8), th.tensor([0, 900]))
    assert not out.output.any()
    tokens = network.pos_embed(th.zeros(1, 3, 8, 8))
    assert tokens.shape == (1, 16, network.emb_dim) and tokens.any()
