"""What is read of a diffusers folder, and what is refused in one line, without running anything."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from safetensors.torch import load_file, save_file
from test_foreign import (
    SCHEDULE,
    STUDENTS,
    DDIMScheduler,
    DDPMScheduler,
    adm_unet,
    distillation_config,
    dit,
    loaded,
    save,
    unet,
)
from tiny import one_line_error

from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.settings import flat
from guided_diffusion.errors import UserError
from guided_diffusion.io.model_folder import read_model_folder, weights_sha256

LEARNED = {"variance_type": "learned_range"}


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "m", unet(), DDPMScheduler(**SCHEDULE))


def weights_of(folder):
    return next(folder.glob("*/diffusion_pytorch_model.safetensors"))


def edited(path, **more):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | more).items() if v != "remove"}))


def test_the_folder_says_everything(folder, tmp_path):
    experiment = load_distillation(distillation_config(tmp_path, folder, STUDENTS["ViT"]))
    teacher, student = flat(experiment.teacher), flat(experiment.student)
    said = {
        "architecture": "diffusers_unet2d",
        "image_size": 8,
        "class_cond": False,
        "block_out_channels": "16,32",
        "attention_head_dim": 0,
        "flip_sin_to_cos": False,
        "norm_eps": 1e-6,
        "diffusion_steps": 20,
        "noise_schedule": "linear",
        "beta_start": 0.001,
        "beta_end": 0.3,
        "learn_sigma": False,
        "sigma_small": True,
        "clip_denoised": True,
    }
    assert said.items() <= teacher.items()
    for name in ("image_size", "diffusion_steps", "beta_start", "beta_end", "learn_sigma", "class_cond"):
        assert student[name] == teacher[name]


def test_classes_are_the_students_too(tmp_path):
    model = unet(num_class_embeds=5, out_channels=6)
    folder = save(tmp_path / "m", model, DDPMScheduler(**SCHEDULE, **LEARNED))
    student = load_distillation(distillation_config(tmp_path, folder, STUDENTS["ADM"])).student
    assert (student.architecture.class_cond, student.architecture.num_classes) == (True, 5)


@pytest.mark.parametrize(
    "configured, told",
    [
        ({"noise_schedule": "cosine"}, "teacher.noise_schedule is 'cosine', but {folder} says 'linear'"),
        ({"diffusion_steps": 1000}, "teacher.diffusion_steps is 1000, but {folder} says 20"),
        ({"image_size": 32}, "teacher.image_size is 32, but {folder} says 8"),
        ({"beta_end": 0.02}, "teacher.beta_end is 0.02, but {folder} says 0.3"),
        ({"prediction_type": "v_prediction"}, "is 'v_prediction', but {folder} says 'epsilon'"),
        ({"learn_sigma": True}, "teacher.learn_sigma is True, but {folder} says False"),
        ({"block_out_channels": [16, 16]}, "block_out_channels is '16,16', but {folder} says '16,32'"),
        ({"architecture": "dit"}, "architecture is 'dit', but the folder's network is a 'diffusers_unet2d'"),
        ({"architecture": "adm"}, "architecture is 'adm', but the folder's network is a 'diffusers_unet2d'"),
        ({"class_cond": True}, "teacher.class_cond is True, but {folder} says False"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused_naming_both(folder, tmp_path, configured, told):
    config = distillation_config(tmp_path, folder, STUDENTS["ViT"], **configured)
    line = one_line_error(script_here("scripts/dynamic_prepare.py", "--config", config, check=False))
    assert told.format(folder=folder) in line


def test_what_agrees_may_be_configured(folder, tmp_path):
    same = {"image_size": 8, "noise_schedule": "linear", "beta_end": 0.3, "block_out_channels": [16, 32]}
    load_distillation(distillation_config(tmp_path, folder, STUDENTS["ViT"], **same))


def test_an_adm_folder_may_run_as_diffusers_wrote_it(tmp_path):
    folder = save(tmp_path / "m", adm_unet(), DDPMScheduler(**SCHEDULE))
    settings, network, _ = loaded(folder)
    assert settings.architecture.architecture == "adm"
    settings, as_written, _ = loaded(folder, architecture="diffusers_unet2d")
    assert settings.architecture.architecture == "diffusers_unet2d"
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    with th.no_grad():
        th.testing.assert_close(network(x, t), as_written(x, t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    ["network alone", "unet/ in a folder", "old: all in one", "shards", "shards of a variant", "symlinks"],
)
def test_other_shapes_of_folders(tmp_path, shape):
    model, keys = unet(), {}
    folder = save(tmp_path / "m", model, DDPMScheduler(**SCHEDULE))
    if shape == "network alone":
        folder = save(tmp_path / "n", model)
        keys = {"noise_schedule": "linear", "diffusion_steps": 20, "beta_start": 0.001, "beta_end": 0.3}
    elif shape == "unet/ in a folder":
        (folder / "model_index.json").unlink()
    elif shape == "old: all in one":
        for part in ("unet", "scheduler"):
            for file in (folder / part).iterdir():
                file.rename(folder / file.name)
            (folder / part).rmdir()
    elif shape.startswith("shards"):
        shutil.rmtree(folder / "unet")
        variant = "fp16" if "variant" in shape else None
        model.save_pretrained(folder / "unet", max_shard_size="20KB", variant=variant)
        assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    else:
        (tmp_path / "blobs").mkdir()
        for file in list(folder.rglob("*.*")):
            if file.is_file():
                file.rename(tmp_path / "blobs" / file.name)
                file.symlink_to(tmp_path / "blobs" / file.name)
    _, network, process = loaded(folder, **keys)
    assert process.num_timesteps == 20
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    with th.no_grad():
        assert th.equal(network(x, t), model(x, t).sample)


def test_a_dit_from_before_its_class(tmp_path):
    """As the published DiTs' folders have it, and diffusers takes it."""
    model = dit()
    folder = save(tmp_path / "m", model, DDPMScheduler(**SCHEDULE))
    edited(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edited(folder / "transformer/config.json", _class_name="Transformer2DModel")
    settings, network, _ = loaded(folder)
    assert settings.architecture.architecture == "dit"
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    with th.no_grad():
        expected = model(x, t, class_labels=th.zeros(2, dtype=th.long)).sample
        th.testing.assert_close(network(x, t), expected, atol=1e-5, rtol=1e-5)
    edited(folder / "transformer/config.json", norm_type="layer_norm")
    with pytest.raises(UserError, match="is a Transformer2DModel; those that can be read"):
        loaded(folder)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"num_train_timesteps": 10}, "embedding has 10 rows, student.diffusion_steps is 20"),
        (
            {"num_train_timesteps": 20, "rescale_timesteps": True},
            "student.rescale_timesteps: a learned timestep embedding takes whole",
        ),
    ],
    ids=str,
)
def test_a_learned_timestep_embedding_has_a_row_for_every_step(folder, tmp_path, keys, told):
    student = STUDENTS["CNN"] | {"time_embedding_type": "learned"} | keys
    config = distillation_config(tmp_path, folder, student)
    assert told in one_line_error(script_here("scripts/image_kd.py", "--config", config, check=False))


def test_a_network_alone_needs_a_process(tmp_path):
    config = distillation_config(tmp_path, save(tmp_path / "n", unet()), STUDENTS["ViT"])
    line = one_line_error(script_here("scripts/image_kd.py", "--config", config, check=False))
    assert "has no scheduler" in line and "noise_schedule" in line


@pytest.mark.parametrize("make", [unet, adm_unet])
def test_old_names_of_attention(tmp_path, make):
    """As google/ddpm-cifar10-32 has them."""
    model = make()
    folder = save(tmp_path / "m", model, DDPMScheduler(**SCHEDULE))
    state = load_file(weights_of(folder))
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert any("proj_attn" in name for name in state)
    save_file(state, weights_of(folder))
    _, network, _ = loaded(folder)
    x, t = th.randn(2, 3, 8, 8), th.tensor([1, 19])
    with th.no_grad():
        th.testing.assert_close(network(x, t), model(x, t).sample, atol=1e-5, rtol=1e-5)


def test_half_precision_weights(tmp_path):
    folder = save(tmp_path / "m", unet().half(), DDPMScheduler(**SCHEDULE))
    _, network, _ = loaded(folder)
    assert {p.dtype for p in network.parameters()} == {th.float32}


def test_a_folder_is_sampled_from(tmp_path):
    """With a configuration that names it and says nothing else, or with none."""
    folder = save(
        tmp_path / "m", dit(out_channels=6, num_embeds_ada_norm=3), DDPMScheduler(**SCHEDULE, **LEARNED)
    )
    config = tmp_path / "m.yaml"
    config.write_text(yaml.safe_dump({"model_path": str(folder)}))
    flags = ["--config", config, "--num_samples", 3, "--timestep_respacing", 4, "--log_dir", tmp_path / "s"]
    script_here("scripts/image_sample.py", *flags, "--model_path", folder)
    with np.load(tmp_path / "s/samples_3x8x8x3.npz") as samples:
        assert samples["arr_0"].shape == (3, 8, 8, 3) and samples["arr_1"].max() < 3
    record = json.loads((tmp_path / "s/sampling.json").read_text())
    assert record["model_sha256"] == weights_sha256(folder)
    flags[-1] = tmp_path / "t"
    script_here("scripts/image_sample.py", "--model_path", folder, *flags[2:])
    files = [(tmp_path / name / "samples_3x8x8x3.npz") for name in "st"]
    assert np.array_equal(*(np.load(file)["arr_0"] for file in files))
    flags[-1] = tmp_path / "s"
    other = save(tmp_path / "o", dit(out_channels=6, num_embeds_ada_norm=3), DDPMScheduler(1000, **LEARNED))
    line = one_line_error(script_here("scripts/image_sample.py", *flags, "--model_path", other, check=False))
    assert "was trained with diffusion_steps 1000, but diffusion_steps is 20" in line


def test_a_pool_belongs_to_the_folders_weights(folder, tmp_path):
    config = distillation_config(tmp_path, folder, STUDENTS["ViT"])
    script_here("scripts/dynamic_prepare.py", "--config", config)
    before = weights_sha256(folder)
    state = load_file(weights_of(folder))
    save_file({name: value + 1 for name, value in state.items()}, weights_of(folder))
    assert weights_sha256(folder) != before
    line = one_line_error(script_here("scripts/image_kd.py", "--config", config, check=False))
    assert "teacher_sha256" in line


def test_a_student_begins_with_a_folders_weights(folder, tmp_path):
    config = distillation_config(tmp_path, folder, {"model_path": str(folder)})
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["--config", config, "--exp_dir", tmp_path / "run", "run.iterations=1", "student.lr=1e-9"]
    script_here("scripts/image_kd.py", *flags)
    state, begun = th.load(tmp_path / "run/model000001.pt"), load_file(weights_of(folder))
    assert state.keys() == begun.keys()
    assert all(th.allclose(value, begun[name], atol=1e-6) for name, value in state.items())


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_what_steps_a_scheduler_visits_is_not_read(folder, name):
    plain, _, _ = loaded(folder)
    edited(
        folder / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler", **{name: True}
    )
    said = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert said[name] is True and loaded(folder)[0].process.diffusion_steps == plain.process.diffusion_steps


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"trained_betas": [0.1] * 20}, "trained_betas is"),
        ({"thresholding": True}, "thresholding is True"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"variance_type": "learned_range"}, "the network does not give a learned one's channels"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"_class_name": "EulerDiscreteScheduler"}, "class is 'EulerDiscreteScheduler'"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps cannot be 'many'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be 1 to"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps must be 1 to"),
        ({"beta_end": 7}, "beta_end must be between 0 and 1"),
    ],
    ids=str,
)
def test_schedulers_that_are_not_expressed(folder, keys, told):
    edited(folder / "scheduler/scheduler_config.json", **keys)
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel"),
        ({"block_out_channels": [16, 10**9]}, "but its weights"),
        ({"block_out_channels": [10**7, 10**7]}, "but its weights"),
        ({"layers_per_block": 10**9}, "differ in the number of layers"),
        ({"layers_per_block": 2}, "differ in the number of layers"),
        ({"down_block_types": ["DownBlock2D", "my_code.Block"]}, "must be DownBlock2D"),
        ({"down_block_types": ["DownBlock2D"] * 1000}, "down_block_types"),
        ({"block_out_channels": "16"}, "block_out_channels"),
        ({"block_out_channels": [-16, 32]}, "block_out_channels must be widths"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"sample_size": [8, 16]}, "sample_size [8, 16] is not the side of a square"),
        ({"sample_size": 10**9}, "sample_size"),
        ({"sample_size": "remove"}, "says no sample_size: give image_size"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 channels, images have 3"),
        ({"out_channels": 5}, "neither as many nor twice as many"),
        ({"norm_num_groups": 7}, "must be divisible by num_groups"),
        ({"time_embedding_dim": 10**9}, "more than 20e9"),
        ({"num_class_embeds": 10**9}, "more than 20e9"),
        ({"act_fn": "x" * 1000}, "act_fn"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_networks_that_are_not_expressed(folder, keys, told):
    edited(folder / "unet/config.json", **keys)
    with pytest.raises(UserError) as error:
        loaded(folder)
    assert told in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_transformer_that_does_not_fit_its_weights(tmp_path):
    folder = save(tmp_path / "m", dit(), DDPMScheduler(**SCHEDULE))
    path = next(folder.glob("*/config.json"))
    if path.parent.name == "scheduler":
        path = folder / "transformer/config.json"
    for keys, told in (
        ({"num_layers": 10**9}, "number of layers"),
        ({"attention_head_dim": 10**6}, "but its weights"),
        ({"num_embeds_ada_norm": 10**9}, "but its weights"),
        ({"patch_size": 3}, "does not divide"),
    ):
        before = path.read_text()
        edited(path, **keys)
        with pytest.raises(UserError, match=told):
            loaded(folder)
        path.write_text(before)


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    "name, told",
    [
        ("pickled weights", "pickled weights alone (diffusion_pytorch_model.bin)"),
        ("no weights", "has no diffusion_pytorch_model.safetensors"),
        ("a pipeline of its own", "is a pipeline of class 'MyPipeline'"),
        ("a pipeline's code", "is a pipeline of class ['my_pipeline', 'MyPipeline']"),
        ("a part's code", "unet in model_index.json is ['my_unet', 'UNet2DModel'], code of its own"),
        ("another part's code", "safety in model_index.json"),
        ("no JSON", "not readable as JSON"),
        ("nested JSON", "not readable as JSON"),
        ("a list", "must hold one JSON object"),
        ("truncated weights", "not a readable safetensors file"),
        ("claims", "not a readable safetensors file"),
        ("an empty folder", "neither model_index.json nor config.json"),
        ("a shard elsewhere", "has no weight_map of file names in its own folder"),
        ("other weights", "but its weights hold one of"),
    ],
)
def test_hostile_folders_are_refused_and_run_nothing(folder, tmp_path, name, told):
    (tmp_path / "my_unet.py").write_text("raise SystemExit('imported')")
    (folder / "unet/my_unet.py").write_text("raise SystemExit('imported')")
    index, weights = folder / "model_index.json", weights_of(folder)
    match name:
        case "pickled weights":
            weights.unlink()
            th.save({"conv_in.weight": Bomb()}, weights.with_suffix(".bin"))
        case "no weights":
            weights.unlink()
        case "a pipeline of its own":
            edited(index, _class_name="MyPipeline")
        case "a pipeline's code":
            edited(index, _class_name=["my_pipeline", "MyPipeline"])
        case "a part's code":
            edited(index, unet=["my_unet", "UNet2DModel"])
        case "another part's code":
            edited(index, safety=["my_unet", "Checker"])
        case "no JSON":
            index.write_text("{'a': 1}")
        case "nested JSON":
            index.write_text('{"a":' * 100_000)
        case "a list":
            (folder / "unet/config.json").write_text("[]")
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "claims":
            header = {"conv_in.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}
            text = json.dumps(header).encode()
            weights.write_bytes(struct.pack("<Q", len(text)) + text + b"0000")
        case "an empty folder":
            shutil.rmtree(folder)
            folder.mkdir()
        case "a shard elsewhere":
            weights.rename(weights.with_name("x.safetensors"))
            text = json.dumps({"weight_map": {"a": "../../../x.safetensors"}})
            (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(text)
        case "other weights":
            save_file({"conv_in.weight": th.zeros(3, 3)}, weights)
    config = distillation_config(tmp_path, folder, STUDENTS["ViT"])
    line = one_line_error(script_here("scripts/dynamic_prepare.py", "--config", config, check=False))
    assert told in line


def test_a_hub_name_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = distillation_config(tmp_path, "nobody/nothing-at-all", STUDENTS["ViT"])
    line = one_line_error(script_here("scripts/dynamic_prepare.py", "--config", config, check=False))
    assert "nobody/nothing-at-all: no such file or folder here, and the Hub does not give" in line


def test_a_hub_name_is_fetched_without_pickles(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = distillation_config(tmp_path, "google/ddpm-cifar10-32", STUDENTS["ViT"])
    script_here("scripts/dynamic_prepare.py", "--config", config)
    assert set(map(str, asked)) == {str(("google/ddpm-cifar10-32", ["*.json", "*.safetensors"]))}


def test_a_ddim_scheduler_of_a_network_with_learned_variance(tmp_path):
    """As DiT's: what it samples with says nothing of the variance, the network's channels do."""
    settings, _, _ = loaded(save(tmp_path / "m", dit(out_channels=6), DDIMScheduler(20, clip_sample=False)))
    assert settings.process.learn_sigma and not settings.process.clip_denoised
    assert read_model_folder(tmp_path / "m").vae is None
