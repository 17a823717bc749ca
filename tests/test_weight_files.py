"""Networks from and to other programs' files: safetensors, and checkpoints of PyTorch Lightning (CompVis)."""

import collections
import json
import os
import sys

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import distillation, make_vae, network, one_line_error, randomise

from guided_diffusion.config.loading import load_distillation, load_experiment
from guided_diffusion.errors import UserError
from guided_diffusion.io.description import read_description
from guided_diffusion.io.files import atomic_path
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import load_network, load_state_dict
from guided_diffusion.script_util import build_network


class Callback:
    """What a Lightning checkpoint holds of somebody's program."""

    def __init__(self):
        self.monitor, self.best = "val/loss", th.tensor(0.25)


class Hyperparameters(dict):
    """As Lightning's AttributeDict."""


class Slotted:
    """Pickled by way of NEWOBJ_EX."""

    def __getnewargs_ex__(self):
        return (), {"name": 1}

    def __new__(cls, name=0):
        return super().__new__(cls)


class Trap:
    """Makes a file if it is unpickled as usual."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def lightning(state, **more):
    """A checkpoint as LDM's: a state_dict among much else."""
    return {
        "epoch": 3,
        "state_dict": state,
        "callbacks": {Callback: Callback(), ("a", 1): 2, "set": {1, 2}, "frozen": frozenset("ab")},
        "hyper_parameters": Hyperparameters(lr=np.float64(1e-4), shape=np.zeros(3), types=[int, Callback]),
        "optimizer_states": [{"state": {0: {"exp_avg": th.zeros(3)}}, "param_groups": []}],
        "lr_schedulers": [collections.deque([1, 2]), collections.defaultdict(list, a=[1]), Slotted()],
        "device": th.device("cpu"),
    } | more


LDM = {
    **{"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "num_head_channels": 16},
    **{"attention_resolutions": "4", "channel_mult": "1,2", "use_scale_shift_norm": False},
    **{"learn_sigma": False, "diffusion_steps": 20, "noise_schedule": "scaled_linear"},
    **{"beta_start": 0.0015, "beta_end": 0.0195},
}


@pytest.fixture
def ldm(tmp_path):
    """An LDM's configuration, its averaged and its last network, and its state dict, with a VAE's entries."""
    make_vae(tmp_path / "vae", "VQModel")
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump(LDM | {"vae_path": str(tmp_path / "vae")}))
    th.manual_seed(0)
    settings = load_experiment(tmp_path / "ldm.yaml").student
    last, average = (randomise(build_network(settings)[0]) for _ in range(2))
    state = {f"model.diffusion_model.{k}": v for k, v in last.state_dict().items()}
    state |= {
        "model_ema." + f"diffusion_model.{k}".replace(".", ""): v for k, v in average.state_dict().items()
    }
    state |= {"model_ema.decay": th.tensor(0.9999), "model_ema.num_updates": th.tensor(7, dtype=th.int32)}
    state |= {"first_stage_model.encoder.conv_in.weight": th.zeros(3), "betas": th.zeros(20)}
    return settings, last, average, collections.OrderedDict(state)


def same(state, module):
    own = module.state_dict()
    return state.keys() == own.keys() and all(th.equal(state[name], own[name]) for name in own)


def test_a_compvis_checkpoint_gives_its_averaged_unet(ldm, tmp_path, capsys):
    settings, last, average, state = ldm
    path = tmp_path / "model.ckpt"
    th.save(lightning(state), path)
    assert same(load_state_dict(path), average)
    assert "its U-Net's averaged weights (model_ema) are taken" in capsys.readouterr().out
    model, _ = build_network(settings)
    load_network(model, path)
    assert same(model.state_dict(), average) and read_description(path) == {}
    th.save(lightning({k: v for k, v in state.items() if not k.startswith("model_ema")}), path)
    assert same(load_state_dict(path), last)
    assert "it has no averaged ones" in capsys.readouterr().out
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    assert same(load_state_dict(tmp_path / "model.safetensors"), average)


def test_torchs_old_format_is_told(tmp_path):
    th.save({"a": th.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"the format of torch before 1\.6"):
        load_state_dict(tmp_path / "old.pt")


def test_averages_of_some_weights_only_are_refused(ldm, tmp_path):
    *_, state = ldm
    del state["model_ema.diffusion_modelout2bias"]
    th.save(lightning(state), tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"only \d+ of its \d+ weights have an average"):
        load_state_dict(tmp_path / "model.ckpt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_of_a_lightning_checkpoint_is_run(ldm, tmp_path, protocol):
    *_, average, state = ldm
    trap, path = Trap(tmp_path / "trapped"), tmp_path / "model.ckpt"
    th.save(lightning(state, loops={"x": [trap], trap: 1}), path, pickle_protocol=protocol)
    assert same(load_state_dict(path), average)
    th.save(lightning(state | {"model.diffusion_model.extra": trap}), path, pickle_protocol=protocol)
    with pytest.raises(UserError, match="refused, nothing in it was run: it holds something else than plain"):
        load_state_dict(path)
    th.save(trap, path, pickle_protocol=protocol)
    with pytest.raises(UserError, match="refused, nothing in it was run: it holds something else than plain"):
        load_state_dict(path)
    assert not (tmp_path / "trapped").exists()
    th.load(path, weights_only=False)
    assert (tmp_path / "trapped").exists()  # as it would have been


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_weights_are_found_whatever_is_around_them(tmp_path, suffix):
    weights, path = {"a.weight": th.randn(2, 3)}, tmp_path / f"model{suffix}"
    parallel = {f"module.{name}": value for name, value in weights.items()}
    for content in (weights, parallel, {"state_dict": weights, "epoch": 3}, {"state_dict": parallel}):
        th.save(content, path)
        found = load_state_dict(path)
        assert found.keys() == weights.keys() and th.equal(found["a.weight"], weights["a.weight"])
    th.save({"model": weights, "ema": weights}, path)
    with pytest.raises(UserError, match=r"holds no state dict \(.*\); it has model, ema"):
        load_state_dict(path)


def test_a_pt_file_stays_as_strict_as_it_was(ldm, tmp_path):
    *_, state = ldm
    th.save(lightning(state), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"refused.*asks for 'test_weight_files.Callback'"):
        read_torch_file(tmp_path / "model.pt")


def test_an_ldm_is_distilled_from_its_checkpoint_to_images(ldm, tmp_path):
    """The published files' whole way: .ckpt and VQ folder -> pool -> student -> decoded samples."""
    *_, state = ldm
    th.save(lightning(state), tmp_path / "model.ckpt")
    space = {"vae_path": str(tmp_path / "vae"), "vae_scale": 1}
    teacher = LDM | space | {"model_path": str(tmp_path / "model.ckpt"), "batch_size": 6}
    config = {
        "teacher": teacher | {"tempfile": str(tmp_path / "pool.cache"), "BATCH": 0.2},
        "student": {k: v for k, v in LDM.items() if k not in ("diffusion_steps", "noise_schedule")}
        | {"batch_size": 4, "ema_rate": "0.9", "save_interval": 2},
        "run": {"iterations": 2, "sample_interval": -1},
    }
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(config))
    done = script_here("scripts/dynamic_prepare.py", "--config", tmp_path / "kd.yaml")
    assert "averaged weights (model_ema) are taken" in done.stdout
    script_here("scripts/image_kd.py", "--config", tmp_path / "kd.yaml", "--exp_dir", tmp_path / "run")
    header = (tmp_path / "run/progress.csv").read_text().splitlines()[0].split(",")
    assert "stage1_mse" in header and not [name for name in header if "vb" in name]
    flags = ["--num_samples", 3, "--timestep_respacing", "ddim4", "--sampler", "ddim"]
    for name in ("run/ema_0.9_000002.pt", "model.ckpt"):
        out = tmp_path / "samples" / name
        script_here(
            "scripts/image_sample.py", "--config", tmp_path / "ldm.yaml", "vae_scale=1",
            "--model_path", tmp_path / name, "--log_dir", out, *flags,
        )  # fmt: skip
        assert NpzFile(out / "samples_3x16x16x3.npz").load("arr_0").shape == (3, 16, 16, 3)


# --- safetensors -----------------------------------------------------------------------------------


def test_safetensors_are_read_wherever_a_network_is_named(tmp_path):
    config = distillation(tmp_path)
    state = th.load(tmp_path / "teacher.pt", weights_only=True)
    save_file(state, tmp_path / "teacher.safetensors")
    told = f"teacher.model_path={tmp_path / 'teacher.safetensors'}"
    initial = f"student.model_path={tmp_path / 'teacher.safetensors'}"
    script_here("scripts/dynamic_prepare.py", "--config", config, told)
    flags = ["--config", config, "--exp_dir", tmp_path / "run", "run.iterations=1"]
    script_here("scripts/image_kd.py", *flags, told, initial)
    for name in ("teacher.pt", "teacher.safetensors"):
        script_here(
            "scripts/image_sample.py", "--config", config, "--model_path", tmp_path / name,
            "--num_samples", 2, "--timestep_respacing", 2, "--log_dir", tmp_path / name.replace(".", "-"),
        )  # fmt: skip
    a, b = (
        NpzFile(tmp_path / folder / "samples_2x16x16x3.npz").load("arr_0")
        for folder in ("teacher-pt", "teacher-safetensors")
    )
    assert np.array_equal(a, b)


def test_a_damaged_one_is_told(tmp_path):
    save_file({"a": th.zeros(99)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    for read in (load_state_dict, read_description):
        with pytest.raises(UserError, match=r"x\.safetensors: not a readable checkpoint \("):
            read(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_state_dict(tmp_path / "y.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short distillation with each format of its networks' files, in two parts."""
    folder = tmp_path_factory.mktemp("formats")
    config = distillation(folder)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    for name in ("pt", "safetensors", "both"):
        flags = ["--config", config, "--exp_dir", folder / name, f"run.weights_format={name}"]
        script_here("scripts/image_kd.py", *flags, "run.iterations=4")
        script_here("scripts/image_kd.py", *flags)
    return folder


def test_formats_say_which_files_are_written(runs):
    suffixes = {
        name: {path.suffix for path in (runs / name).glob("model*")}
        | {p.suffix for p in (runs / name).glob("ema_*")}
        for name in ("pt", "safetensors", "both")
    }
    assert suffixes == {
        "pt": {".pt"}, "safetensors": {".safetensors"}, "both": {".pt", ".safetensors"}
    }  # fmt: skip
    for name in suffixes:
        manifest = json.loads((runs / name / "checkpoint000006.json").read_text())["files"]
        there = {path.name for path in (runs / name).iterdir() if "000006." in path.name}
        assert set(manifest) == there - {"checkpoint000006.json", "samples000006.png"}


def test_all_resume_and_end_in_the_same_weights(runs):
    files = {
        "pt": ["pt/{}000006.pt", "both/{}000006.pt"],
        "safetensors": ["safetensors/{}000006.safetensors", "both/{}000006.safetensors"],
    }
    for kind in ("model", "ema_0.9_", "ema_0.99_"):
        paths = [runs / name.format(kind) for names in files.values() for name in names]
        first, *others = (load_state_dict(path) for path in paths)
        assert len(first) > 10
        assert all(o.keys() == first.keys() and all(th.equal(o[k], first[k]) for k in o) for o in others)
        descriptions = [read_description(path) | {"revision": ""} for path in paths]
        assert all(description == descriptions[0] for description in descriptions)
    with safe_open(runs / "both/model000006.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # so that transformers and diffusers take it


def test_a_run_changes_its_format_as_it_resumes(runs, tmp_path):
    config = runs / "tiny.yaml"
    flags = ["--config", config, "--exp_dir", tmp_path / "run"]
    script_here("scripts/image_kd.py", *flags, "run.iterations=4", "run.weights_format=safetensors")
    script_here("scripts/image_kd.py", *flags)
    assert not (tmp_path / "run/model000004.pt").exists()
    ours, theirs = (load_state_dict(f / "model000006.pt") for f in (tmp_path / "run", runs / "pt"))
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)
    path = runs / "safetensors/model000004.safetensors"
    script_here(
        "scripts/image_kd.py",
        "--config",
        config,
        "--exp_dir",
        tmp_path / "other",
        "--resume_checkpoint",
        path,
    )
    theirs = load_state_dict(tmp_path / "other/model000006.pt")
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_safetensors_checkpoint_is_not_resumed_from(runs):
    newest = newest_checkpoint(runs / "safetensors")
    assert newest.step == 6 and newest.path("model").suffix == ".safetensors"
    path, whole = newest.path("model"), newest.path("model").read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert newest_checkpoint(runs / "safetensors").step == 4
    path.write_bytes(whole)


def test_an_unknown_format_is_refused(runs):
    done = script_here(
        "scripts/image_kd.py", "--config", runs / "tiny.yaml", "run.weights_format=bin", check=False
    )
    assert "run.weights_format must be pt, safetensors or both, not 'bin'" in one_line_error(done)


# --- sampling without a configuration --------------------------------------------------------------


@pytest.mark.parametrize("file", ["pt/ema_0.99_000006.pt", "safetensors/ema_0.99_000006.safetensors"])
def test_a_checkpoint_of_ours_needs_no_configuration(runs, tmp_path, file):
    flags = ["--model_path", runs / file, "--num_samples", 3, "--timestep_respacing", 3]
    script_here("scripts/image_sample.py", *flags, "--log_dir", tmp_path / "without")
    script_here(
        "scripts/image_sample.py", "--config", runs / "tiny.yaml", *flags, "--log_dir", tmp_path / "with"
    )
    a, b = (NpzFile(tmp_path / name / "samples_3x16x16x3.npz") for name in ("without", "with"))
    assert np.array_equal(a.load("arr_0"), b.load("arr_0"))
    assert a.load_json("provenance")["config"] == "tiny"
    done = script_here("scripts/image_sample.py", *flags, "num_heads=4", check=False)
    assert "was trained with num_heads 2, but num_heads is 4" in one_line_error(done)
    done = script_here("scripts/image_sample.py", *flags, "num_head=4", check=False)
    assert "unknown key 'num_head'; did you mean 'num_heads'?" in one_line_error(done)


def test_of_latents_too(tmp_path):
    make_vae(tmp_path / "vae")
    keys = network(8, vae_path=str(tmp_path / "vae"), batch_size=4, ema_rate="0.9", save_interval=2)
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(keys))
    np.savez(tmp_path / "images.npz", np.zeros((4, 16, 16, 3), np.uint8))
    script_here(
        "scripts/image_train.py", "--config", tmp_path / "net.yaml", "--data_dir", tmp_path / "images.npz",
        "--exp_dir", tmp_path / "run", "run.iterations=2", "run.sample_interval=-1",
        "run.weights_format=safetensors",
    )  # fmt: skip
    script_here(
        "scripts/image_sample.py", "--model_path", tmp_path / "run/model000002.safetensors",
        "--num_samples", 2, "--timestep_respacing", 2, "--log_dir", tmp_path / "samples",
    )  # fmt: skip
    assert (tmp_path / "samples/samples_2x16x16x3.npz").is_file()


def test_another_programs_needs_one(tmp_path):
    config = distillation(tmp_path)
    assert load_distillation(config).name == "tiny"
    done = script_here("scripts/image_sample.py", "--model_path", tmp_path / "teacher.pt", check=False)
    assert "does not say what network it is of; its configuration does (--config)" in one_line_error(done)


def test_a_file_does_not_choose_what_is_imported(tmp_path):
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trapped')!r})")
    told = json.dumps({"architecture": {"architecture": "evil:Net"}, "process": {}})
    save_file({"a": th.zeros(1)}, tmp_path / "x.safetensors", metadata={"guided_diffusion": told})
    sys.path.insert(0, str(tmp_path))
    done = script_here("scripts/image_sample.py", "--model_path", tmp_path / "x.safetensors", check=False)
    sys.path.remove(str(tmp_path))
    assert "is of the architecture 'evil:Net', which is not built in" in one_line_error(done)
    assert not (tmp_path / "trapped").exists()


def test_a_safetensors_file_is_as_readable_as_every_other(tmp_path):
    (tmp_path / "usual").touch()
    with atomic_path(tmp_path / "weights.safetensors") as temporary:
        save_file({"x": th.zeros(1)}, temporary)
    usual, ours = ((tmp_path / name).stat().st_mode for name in ("usual", "weights.safetensors"))
    assert ours == usual
