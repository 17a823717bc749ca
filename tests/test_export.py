"""Students as diffusers pipelines: they load there and compute the same, or are not written."""

import errno
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from test_foreign import T, diffusers, loaded, scramble
from tiny import denoiser, one_line_error
from tiny import network as network_keys

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.errors import UserError
from guided_diffusion.io.description import described
from guided_diffusion.runs.weights import load_state_dict
from guided_diffusion.script_util import build_network
from guided_diffusion.setups import exporting

ADM = network_keys(8, 16, attention_resolutions="4")
PROCESS = {"learn_sigma": True, "diffusion_steps": T, "noise_schedule": "cosine", "image_size": 8}
UNET = {
    "architecture": "diffusers_unet2d",
    "block_out_channels": "8,16",
    "down_block_types": "DownBlock2D,AttnDownBlock2D",
    "up_block_types": "AttnUpBlock2D,UpBlock2D",
    "norm_num_groups": 4,
    **PROCESS,
}
DIT = {"architecture": "dit", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, **PROCESS}
CLASSES = {"class_cond": True, "num_classes": 5}
CASES = {
    "adm": ADM,
    "adm, legacy order": ADM | {"use_new_attention_order": False, "num_head_channels": 8},
    "adm, classes": ADM | CLASSES,
    "adm, fixed variance": ADM | {"learn_sigma": False, "noise_schedule": "linear", "beta_end": 0.3},
    "adm, v": ADM
    | {"learn_sigma": False, "sigma_small": True, "prediction_type": "v_prediction", "beta_end": 0.3}
    | {"noise_schedule": "scaled_linear"},
    "unet2d": UNET,
    "unet2d, classes, unclipped": UNET | CLASSES | {"clip_denoised": False},
    "dit": DIT,
    "dit, classes": DIT | CLASSES,
    "adm, linear": ADM | {"noise_schedule": "linear", "diffusion_steps": 1000, "learn_sigma": False},
    "adm, two classes": ADM | {"class_cond": True, "num_classes": 2},
}


def prepared(folder, keys):
    """A configuration and random weights; the flags that export them."""
    config, weights = folder / "student.yaml", folder / "model.pt"
    config.write_text(yaml.safe_dump(keys))
    network, _ = build_network(load_experiment(config).student)
    th.save(scramble(network).state_dict(), weights)
    return [
        "scripts/export_diffusers.py",
        "--config",
        config,
        "--model_path",
        weights,
        "--out",
        folder / "out",
    ]


@pytest.mark.parametrize("name", CASES)
def test_an_export_loads_and_comes_back(tmp_path, name):
    flags = prepared(tmp_path, CASES[name])
    done = script_here(*flags, "--score", "FID 5.1")
    assert "gives the same" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"student.yaml", "model.pt", "out"}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline).__name__ == "DDPMPipeline"
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").is_file()
    original = load_experiment(tmp_path / "student.yaml").student
    settings, network, _ = loaded(tmp_path / "out")
    assert settings.architecture.architecture == original.architecture.architecture
    process = (
        "diffusion_steps",
        "noise_schedule",
        "prediction_type",
        "learn_sigma",
        "sigma_small",
        "clip_denoised",
    )
    process += ("beta_start", "beta_end")
    assert all(getattr(settings.process, key) == getattr(original.process, key) for key in process)
    before, _ = build_network(original)
    before.load_state_dict(load_state_dict(tmp_path / "model.pt"))
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 17])
    y = th.tensor([0, network.num_classes - 1]) if network.num_classes else None
    with th.no_grad():
        th.testing.assert_close(network(x, t, y), before.eval()(x, t, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adm", "adm, classes", "adm, two classes", "dit", "dit, classes"])
def test_the_cards_code_runs(tmp_path, name):
    script_here(*prepared(tmp_path, CASES[name]), "--score", "FID 5.1")
    card = (tmp_path / "out/README.md").read_text()
    assert "- FID 5.1" in card and "license: unknown" in card and "Configuration: student" in card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert "50" not in code  # the process has 20 steps
    code = code.replace("20", "5").replace('"out"', repr(str(tmp_path / "out")))
    names: dict = {}
    exec(code, names)
    assert len(names["images"]) == 4 and names["images"][0].size == (8, 8)


def test_an_export_says_that_its_last_label_is_the_null_class(tmp_path):
    """Diffusers counts it among the others; our own commands never draw it, and its samples are ours."""
    script_here(*prepared(tmp_path, ADM | CLASSES | {"null_class": True}))
    assert "of 5 classes (label 5: no class)" in (tmp_path / "out/README.md").read_text()
    flags = ["--num_samples", 16, "--timestep_respacing", 2]
    script_here(
        "scripts/image_sample.py", "--model_path", tmp_path / "out", *flags, "--log_dir", tmp_path / "a"
    )
    model = ["--config", tmp_path / "student.yaml", "--model_path", tmp_path / "model.pt"]
    script_here("scripts/image_sample.py", *model, *flags, "--log_dir", tmp_path / "b")
    drawn = [dict(np.load(next(folder.glob("samples_*.npz")))) for folder in (tmp_path / "a", tmp_path / "b")]
    assert set(drawn[0]["arr_1"]) <= set(range(5))
    np.testing.assert_array_equal(drawn[0]["arr_1"], drawn[1]["arr_1"])
    assert np.abs(drawn[0]["arr_0"].astype(int) - drawn[1]["arr_0"]).max() <= 1


def test_the_card_tells_of_the_run_rather_than_of_the_configuration(tmp_path):
    flags = prepared(tmp_path, DIT)
    state = load_state_dict(tmp_path / "model.pt")
    told = {"config": "a-run", "method": "distilled by X", "teacher": "t.pt", "step": 7}
    th.save(described(state, told), tmp_path / "model.pt")
    script_here(*flags)
    card = (tmp_path / "out/README.md").read_text()
    facts = ("Configuration: a-run", "Teacher: t.pt", "Method: distilled by X", "Iterations: 7")
    assert all(f"- {fact}\n" in card for fact in facts)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"num_heads": 2, "attention_resolutions": "8,4"}, "attention heads are 8 and 16 wide"),
        ({"channel_mult": "2,2"}, "first level is 32 wide"),
        ({"rescale_timesteps": True}, "rescale_timesteps"),
        ({"timestep_respacing": "5"}, "knows some of its steps only (timestep_respacing 5)"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, keys, told):
    line = one_line_error(script_here(*prepared(tmp_path, ADM | keys), check=False))
    assert "cannot be expressed in diffusers" in line and told in line
    assert not (tmp_path / "out").exists()


def test_a_mismatch_leaves_nothing(tmp_path, monkeypatch):
    """Such as attention groups that diffusers would take for others: it loads, and differs."""
    from guided_diffusion.unet import UNetModel

    right = UNetModel.for_diffusers

    def wrong(self):
        form = right(self)
        form.config["freq_shift"] = 1
        return form

    flags = prepared(tmp_path, ADM)
    monkeypatch.setattr(UNetModel, "for_diffusers", wrong)
    line = one_line_error(script_here(*flags, check=False))
    assert "a forward pass by diffusers differs" in line
    assert {path.name for path in tmp_path.iterdir()} == {"student.yaml", "model.pt"}


def test_an_export_that_cannot_take_anothers_place_leaves_it(tmp_path, monkeypatch):
    flags = prepared(tmp_path, DIT)
    script_here(*flags)
    out, rename = Path(flags[-1]), Path.rename
    kept = sorted(path.name for path in out.iterdir())

    def fails(self, target):
        if self.name == out.name and Path(target) == out:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert "No space left" in one_line_error(script_here(*flags, "--overwrite", check=False))
    assert sorted(path.name for path in out.iterdir()) == kept
    assert not list(tmp_path.glob(f".{out.name}*"))


def test_nothing_is_overwritten_unasked(tmp_path):
    flags = prepared(tmp_path, DIT)
    script_here(*flags)
    assert "give --overwrite" in one_line_error(script_here(*flags, check=False))
    script_here(*flags, "--overwrite")
    flags[-1] = tmp_path
    line = one_line_error(script_here(*flags, "--overwrite", check=False))
    assert "no export" in line and (tmp_path / "model.pt").exists()
    (tmp_path / "out/README.md").write_text("a teacher's own")
    flags[-1] = tmp_path / "out"
    assert "no export" in one_line_error(script_here(*flags, "--overwrite", check=False))
    flags[-1] = tmp_path / "other"
    assert "owner/name" in one_line_error(script_here(*flags, "--push", "x", check=False))
    assert not (tmp_path / "other").exists()


def test_a_filled_in_licence_is_pushed(tmp_path, monkeypatch):
    """An export of the same checkpoint is uploaded as it is, its code then loading it from the Hub."""
    flags = prepared(tmp_path, ADM)
    script_here(*flags)
    card = tmp_path / "out/README.md"
    card.write_text(
        card.read_text().replace("license: unknown", "license: mit").replace("tags: [", "tags: [x, ")
    )
    pushed = []
    monkeypatch.setattr(exporting, "push", lambda folder, name: pushed.append((folder, name)))
    told = script_here(*flags, "--push", "me/x").stdout
    assert "stays as it is" in told and pushed == [(tmp_path / "out", "me/x")]
    text = card.read_text()
    assert "license: mit" in text and 'from_pretrained("me/x")' in text and "\n# me/x\n" in text
    script_here(*flags, "--push", "me/z")  # another name, or the right one after a slip
    assert 'from_pretrained("me/z")' in card.read_text() and "\n# me/z\n" in card.read_text()
    told = one_line_error(script_here(*flags, "--push", "me/z", "--score", "FID 5", check=False))
    assert "--overwrite" in told and len(pushed) == 2
    script_here(*flags, "--push", "me/y", "--overwrite")
    assert "license: unknown" in card.read_text() and 'from_pretrained("me/y")' in card.read_text()


def test_a_signal_during_an_import_ends_it_before_anything_is_written(tmp_path, monkeypatch):
    flags = prepared(tmp_path, ADM)
    monkeypatch.setattr("guided_diffusion.processes.stopping._is_import", lambda frame: True)
    right = exporting.require_same

    def comes_too_late(*args):
        right(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(exporting, "require_same", comes_too_late)
    done = script_here(*flags, check=False)
    assert done.returncode == 75 and "stopped by SIGTERM" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"student.yaml", "model.pt"}


def test_a_network_that_knows_some_steps_only_is_not_exported_as_one_that_knows_all(tmp_path):
    flags = prepared(tmp_path, ADM)
    told = {"process": {"timestep_respacing": "5"}}
    th.save(described(load_state_dict(tmp_path / "model.pt"), told), tmp_path / "model.pt")
    assert "knows the 5 steps" in one_line_error(script_here(*flags, check=False))


def test_a_vae_of_another_variant_is_copied(tmp_path):
    vae = diffusers.VQModel(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3)
    vae.half().save_pretrained(tmp_path / "vae", variant="fp16")
    keys = ADM | {"image_size": 8, "vae_path": str(tmp_path / "vae"), "clip_denoised": False}
    script_here(*prepared(tmp_path, keys))
    copy = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False).vqvae
    assert all(th.equal(copy.state_dict()[name], value.float()) for name, value in vae.state_dict().items())
    assert str(tmp_path) not in (tmp_path / "out/vqvae/config.json").read_text()


def test_blocks_with_skip_know_no_learned_variance(tmp_path):
    blocks = {"down_block_types": "SkipDownBlock2D,AttnSkipDownBlock2D"}
    blocks |= {"up_block_types": "AttnSkipUpBlock2D,SkipUpBlock2D"}
    with pytest.raises(UserError, match="know no learned variance"):
        build_network(denoiser(**UNET | blocks))


@pytest.mark.parametrize("probability, warned", [(0.0, True), (0.1, False)])
def test_guidance_by_a_null_class_that_was_not_trained_is_told(tmp_path, probability, warned):
    keys = ADM | CLASSES | {"null_class": True, "class_dropout_prob": probability}
    flags = prepared(tmp_path, keys)
    told = {"architecture": {"class_dropout_prob": probability}}
    th.save(described(load_state_dict(tmp_path / "model.pt"), told), tmp_path / "model.pt")
    script_here(*flags)
    assert ("not trained" in (tmp_path / "out/README.md").read_text()) == warned
    draw = ["--num_samples", 2, "--timestep_respacing", 2, "--guidance_scale", 2, "--log_dir", tmp_path / "s"]
    done = script_here("scripts/image_sample.py", *flags[1:5], *draw)
    assert ("a null class that was not trained" in done.stderr) == warned
