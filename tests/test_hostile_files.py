"""Files made to do harm: nothing in them runs, allocates what it only claims, or reaches the terminal raw."""

import json

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from PIL import Image
from test_foreign import diffusers
from tiny import T, denoiser, distillation, network, one_line_error

from evaluations.metrics import Gaussian
from evaluations.reference import _require_consistent
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.distill.pool_file import read_pool, read_pool_header, write_pool
from guided_diffusion.errors import UserError, printable
from guided_diffusion.image_datasets import read_image
from guided_diffusion.io.description import described
from guided_diffusion.io.json_text import parse_json
from guided_diffusion.io.model_folder import weight_files
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.logger import read_progress
from guided_diffusion.runs.weights import build_loaded
from guided_diffusion.script_util import build_network
from guided_diffusion.setups.inspecting import inspect
from guided_diffusion.spaces import LatentSpace
from guided_diffusion.studies.commands import Steps

# --- images ----------------------------------------------------------------------------------------


def test_an_image_starts_no_program(tmp_path, monkeypatch):
    """Pillow tells PostScript by its first bytes, whatever it is called, and gives it to Ghostscript."""
    (tmp_path / "bin").mkdir()
    witness = tmp_path / "ran"
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {witness}\nexit 1\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    image = tmp_path / "a_1.png"
    image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UserError, match="not a readable image"):
        read_image(image, 8)
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(1, 4000), (9000, 10000)])
def test_images_that_are_too_thin_or_too_large_are_refused(tmp_path, size):
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too large or too thin"):
        read_image(tmp_path / "a.png", 64)


# --- weights ---------------------------------------------------------------------------------------


def test_a_network_is_built_only_for_a_file_that_has_its_weights(tmp_path, monkeypatch):
    """The file says itself how large it is: it is believed on the meta device alone."""
    built = []

    def watched(*args):
        built.append(th.empty(0).device.type)
        return build_network(*args)

    monkeypatch.setattr("guided_diffusion.runs.weights.build_network", watched)
    small = denoiser(**network(8, 16))
    th.save(build_network(small)[0].state_dict(), tmp_path / "small.pt")
    with pytest.raises(UserError, match="does not fit"):
        build_loaded(denoiser(**network(8, 64)), tmp_path / "small.pt")
    assert built == ["meta"]
    before = th.get_rng_state()
    loaded, _ = build_loaded(small, tmp_path / "small.pt")
    after = th.get_rng_state()
    th.set_rng_state(before)
    build_network(small)
    assert th.equal(after, th.get_rng_state())  # the claim has drawn no random number
    assert built == ["meta", "meta", "cpu"] and next(loaded.parameters()).device.type == "cpu"


def test_tensors_that_see_the_same_numbers_again_and_again_are_refused(tmp_path):
    numbers = th.randn(1000)
    tied = {f"w{i}": numbers[:900].view(30, 30) for i in range(3)}
    th.save(tied, tmp_path / "tied.pt")
    assert th.equal(read_torch_file(tmp_path / "tied.pt")["w2"], tied["w0"])
    th.save({f"w{i}": numbers[:] for i in range(300)}, tmp_path / "views.pt")
    with pytest.raises(UserError, match="again and again"):
        read_torch_file(tmp_path / "views.pt")


@pytest.mark.parametrize("shards", [{"a": ["x"]}, {"a": 1, "b": "x"}, {"a": "../x"}, {}])
def test_an_index_that_names_no_files(tmp_path, shards):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="no weight_map"):
        weight_files(tmp_path)


def test_a_vae_that_gives_no_finite_numbers_is_told(tmp_path):
    vae = diffusers.VQModel(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3)
    vae.decoder.conv_out.bias.data.fill_(th.nan)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no finite numbers"):
        LatentSpace(tmp_path, 4).decode(th.zeros(1, 3, 4, 4))


# --- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, told",
    [
        ("a0: xxxxxxxxxx\n" + "".join(f"a{n}: {f'${{a{n - 1}}}' * 10}\n" for n in range(1, 11)), "unfold"),
        (f"lr: '{'${a:' * 300}b{'}' * 300}'\n", "recursion"),
        (f"lr: 1{'0' * 400}\n", "lr is beyond all numbers"),
    ],
    ids=["references", "nested references", "a long number"],
)
def test_configurations_that_unfold(tmp_path, text, told):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        load_experiment(tmp_path / "c.yaml")


@pytest.mark.parametrize("override", ["lr=!!int foo", "lr=!!timestamp x", f"lr={'9' * 5000}"])
def test_overrides_of_impossible_values(tmp_path, override):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\n")
    with pytest.raises(UserError):
        load_experiment(tmp_path / "c.yaml", [override])


def test_a_folder_may_be_called_like_a_reference(tmp_path):
    folder = tmp_path / "v${oc.env:HOME}"
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
    assert inspect(folder).experiment.student.training.model_path == str(folder)


def test_a_runs_configuration_does_not_choose_what_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    config, run = distillation(tmp_path), tmp_path / "run"
    script_here("scripts/dynamic_prepare.py", "--config", config)
    command = ["scripts/image_kd.py", "--config", config, "--exp_dir", run]
    script_here(*command, "run.iterations=1")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["student"]["architecture"] = "evil:Net"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    script_here(*command, "run.iterations=2")
    assert not (tmp_path / "imported").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["student"]["architecture"] == "adm"


# --- records ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"1{'0' * 400}", "[" * 100_000, "{", ""])
def test_json_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json("[1, 2.5, 12345678901234567890]") == [1, 2.5, 12345678901234567890]


def test_a_damaged_account_of_steps_is_told(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(UserError, match="remove it"):
        Steps(tmp_path / "steps.json")


def test_an_endless_field_of_a_progress_file_is_left_out(tmp_path):
    (tmp_path / "progress.csv").write_text(f"step,loss\n1,0.5\n2,{'0' * 200_000}\n3,0.25\n")
    assert [row["step"] for row in read_progress(tmp_path / "progress.csv")] == [1, 3]


def test_labels_of_a_pool_are_classes_of_the_teachers(tmp_path):
    config = distillation(tmp_path, class_cond=True, num_classes=3)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    pool = tmp_path / "pool.cache"
    content = read_pool(pool, T, (3, 16, 16))
    content.y[0] = 3
    write_pool(pool, [content], read_pool_header(pool))
    done = script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", check=False)
    assert "labels from 0 to 3, and the teacher 3 classes" in one_line_error(done)


def test_moments_that_are_not_finite_are_refused(tmp_path):
    config, run = distillation(tmp_path), tmp_path / "run"
    script_here("scripts/dynamic_prepare.py", "--config", config)
    command = ["scripts/image_kd.py", "--config", config, "--exp_dir", run]
    script_here(*command, "run.iterations=1")
    optimizer = run / "opt000001.pt"
    state = th.load(optimizer, weights_only=True)
    state["optimizer"]["state"][0]["exp_avg_sq"].fill_(th.nan)
    th.save(state, optimizer)
    (run / "checkpoint000001.json").unlink()  # its checksum would tell
    done = script_here(
        *command, "--resume_checkpoint", run / "model000001.pt", "run.iterations=2", check=False
    )
    assert "not finite" in one_line_error(done)


REFERENCE = {
    "gaussian": Gaussian(np.zeros(3), np.eye(3)),
    "spatial": None,
    "features": np.ones((9, 3)),
    "neighbours": np.ones((9, 2)),
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"gaussian": Gaussian(np.zeros(2), np.eye(3))},
        {"features": np.ones(9)},
        {"features": np.full((9, 3), np.nan)},
        {"neighbours": np.ones((8, 2))},
        {"neighbours": np.ones(9)},
        {"gaussian": Gaussian(np.array(["a", "b", "c"]), np.eye(3))},
    ],
)
def test_statistics_that_do_not_belong_together(wrong):
    _require_consistent(**REFERENCE)
    with pytest.raises(UserError):
        _require_consistent(**REFERENCE | wrong)


# --- the terminal ----------------------------------------------------------------------------------


def test_what_a_file_says_does_not_move_the_cursor(tmp_path):
    assert printable("ä\tb\n" + "a\x1b[2J\r\x9b\ud800") == "ä\tb\n" + r"a\x1b[2J\r\x9b\ud800"
    th.save(described({"a\x1b[2J\rowned": th.zeros(1)}, {"config": "x"}), tmp_path / "m.pt")
    done = script_here("scripts/inspect_checkpoint.py", tmp_path / "m.pt", check=False)
    assert done.returncode == 1 and "\x1b" not in done.stdout + done.stderr
