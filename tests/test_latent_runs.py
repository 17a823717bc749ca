"""Whole runs in a latent space: pool, teacher and student live in latents, what people see is decoded."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from tiny import ROOT, T, distillation, make_vae, network, one_line_error

from guided_diffusion.config.loading import load_distillation, load_experiment
from guided_diffusion.distill.pool_file import read_pool, read_pool_header
from guided_diffusion.io import files
from guided_diffusion.io.description import read_description
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.runs.weights import load_network, load_state_dict
from guided_diffusion.sampling.samplers import SeededNoise
from guided_diffusion.script_util import build_network, build_space

SIZE = 8  # of the latents; images are 16x16
LATENTS = (4, SIZE, SIZE)


def prepare(config, *more, check=True):
    return script_here("scripts/dynamic_prepare.py", "--config", config, *more, check=check)


def distil(folder, run, *more, check=True):
    flags = ["--config", folder / "tiny.yaml", "--exp_dir", folder / run]
    return script_here("scripts/image_kd.py", *flags, *more, check=check)


def sample(config, weights, out, *more, check=True):
    return script_here(
        "scripts/image_sample.py", "--config", config, "--model_path", weights, "--log_dir", out,
        "--num_samples", 5, "--timestep_respacing", 4, *more, check=check,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a VAE, a distillation in its latents, and the run of it."""
    folder = tmp_path_factory.mktemp("latent")
    make_vae(folder / "vae", channels=4, scaling_factor=0.5)
    config = distillation(
        folder, SIZE, teacher__vae_path=str(folder / "vae"), run__sample_respacing=3, run__num_samples=2
    )
    prepare(config)
    distil(folder, "run", "run.sample_interval=0")
    return folder


def test_the_pool_and_the_networks_live_in_latents(run):
    pool = read_pool(run / "pool.cache", T, LATENTS)
    assert len(pool) == 8 * 4
    experiment = load_distillation(run / "tiny.yaml")
    assert experiment.student.space == experiment.teacher.space  # a student has its teacher's
    for denoiser in (experiment.teacher, experiment.student):
        model, process = build_network(denoiser)
        assert model.shape == LATENTS and process.bounds is None
    state = load_state_dict(run / "run/model000006.pt")
    assert state["input_blocks.0.0.weight"].shape[1] == 4 and state["out.2.weight"].shape[0] == 8


def test_grids_are_decoded(run):
    from PIL import Image

    assert Image.open(run / "run/samples000006.png").size == (2 * 16 + 6, 16 + 4)


def test_what_was_written_knows_the_vae(run):
    sha = build_space(load_distillation(run / "tiny.yaml").teacher).identity()["vae_sha256"]
    assert read_pool_header(run / "pool.cache")["vae_sha256"] == sha
    space = read_description(run / "run/model000006.pt")["space"]
    assert (space["kind"], space["vae"], space["vae_sha256"]) == ("latents", "AutoencoderKL", sha)
    assert space["shape"] == list(LATENTS) and space["vae_scale"] == 0.5


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_samples_are_decoded_images(run, tmp_path, sampler):
    weights = run / "run/ema_0.99_000006.pt"
    sample(run / "tiny.yaml", weights, tmp_path, "--sampler", sampler, "--batch_size", 2)
    archive = NpzFile(tmp_path / "samples_5x16x16x3.npz")
    images = archive.load("arr_0")
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    space = build_space(load_distillation(run / "tiny.yaml").student)
    for told in (archive.load_json("provenance"), json.loads((tmp_path / "sampling.json").read_text())):
        assert told["vae_sha256"] == space.identity()["vae_sha256"] and told["space"] == space.describe()
    if sampler == "ddim":  # the very images, without the scripts
        respaced = ["student.timestep_respacing=4", "teacher.timestep_respacing=4"]
        model, process = build_network(load_distillation(run / "tiny.yaml", respaced).student)
        load_network(model, weights)
        noise = SeededNoise(0, range(5), "cpu")
        x = process.ddim_sample_loop(model.eval(), (5, *LATENTS), noise_fn=noise)
        assert np.abs(space.decode(x).astype(int) - images).max() <= 1


def test_resuming_goes_on_exactly(run):
    distil(run, "again", "run.iterations=4")
    distil(run, "again")
    first, again = (load_state_dict(run / name / "model000006.pt") for name in ("run", "again"))
    assert all(th.equal(value, again[name]) for name, value in first.items())


def test_options_of_the_pool_work_in_latents_and_resume_exactly(run):
    """Where no bounds clip what the student predicts."""
    hops = ["distill.advance_stride=4", "distill.loss_weight=v", "distill.on_policy=0.7"]
    between = ["distill.stage2_time=between", "distill.stage2_fraction=0.5"]
    options = [*hops, *between, "distill.bottleneck_weight=0.1"]
    distil(run, "whole", *options)
    log = (run / "whole/log.txt").read_text()
    assert "stage 2 between t and T, loss weight v, hops of 4, on-policy 0.7, bottleneck x 0.1" in log
    distil(run, "parts", *options, "--resume_checkpoint", run / "whole/model000004.pt")
    states = [load_state_dict(run / name / "model000006.pt") for name in ("whole", "parts")]
    assert all(
        th.equal(value, states[1][name]) and value.isfinite().all() for name, value in states[0].items()
    )
    pools = [read_pool(run / name / "teacher-state-000006.cache", T, LATENTS) for name in ("whole", "parts")]
    assert th.equal(pools[0].x, pools[1].x) and pools[0].x.isfinite().all()
    assert not th.equal(pools[0].x, read_pool(run / "run/teacher-state-000006.cache", T, LATENTS).x)


@pytest.mark.slow
def test_two_ranks(run, tmp_path):
    from tiny import script

    config = tmp_path / "tiny.yaml"
    tree = yaml.safe_load((run / "tiny.yaml").read_text())
    tree["teacher"]["tempfile"] = str(tmp_path / "pool.cache")
    config.write_text(yaml.safe_dump(tree))
    script("scripts/dynamic_prepare.py", "--config", config, ranks=2)
    script("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", ranks=2)
    assert (tmp_path / "run/model000006.pt").is_file()


def test_another_vae_is_refused_everywhere(run, tmp_path):
    make_vae(tmp_path / "other", channels=4, seed=1, scaling_factor=0.5)
    other, weights = f"vae_path={tmp_path / 'other'}", run / "run/model000006.pt"
    told = one_line_error(distil(run, "new", f"teacher.{other}", check=False))
    assert "was made for vae_sha256" in told
    told = one_line_error(distil(run, "run", f"teacher.{other}", "run.iterations=7", check=False))
    assert "was trained on latents with vae_sha256" in told and "student.vae_path" in told
    told = one_line_error(
        sample(
            run / "tiny.yaml", weights, tmp_path / "x", f"student.{other}", f"teacher.{other}", check=False
        )
    )
    assert "was trained on latents with vae_sha256" in told
    told = one_line_error(
        sample(run / "tiny.yaml", weights, tmp_path / "x", "teacher.vae_scale=2", check=False)
    )
    assert "with vae_scale 0.5, but here it is 2.0" in told


def test_a_teacher_and_a_student_in_different_spaces_are_refused(run, tmp_path):
    make_vae(tmp_path / "other", channels=4)
    told = one_line_error(distil(run, "new", f"student.vae_path={tmp_path / 'other'}", check=False))
    assert "student.vae_path is" in told and "both must be the same" in told


def test_pixels_are_refused_for_a_checkpoint_of_latents_with_three_channels(tmp_path):
    make_vae(tmp_path / "vae")
    config = distillation(tmp_path, SIZE, teacher__vae_path=str(tmp_path / "vae"))
    prepare(config)
    distil(tmp_path, "run", "run.iterations=1")
    tree = yaml.safe_load(config.read_text())
    del tree["teacher"]["vae_path"]
    config.write_text(yaml.safe_dump(tree))
    told = one_line_error(sample(config, tmp_path / "run/model000001.pt", tmp_path / "x", check=False))
    assert "was trained on latents with kind 'latents', but here it is 'pixels'" in told


def test_samples_drawn_through_another_vae_are_not_joined(run, tmp_path):
    """A teacher's file says nothing of its VAE, so the samples must."""
    tree = yaml.safe_load((run / "tiny.yaml").read_text())["teacher"]
    keys = {k: v for k, v in tree.items() if k in network(SIZE) or k == "vae_path"}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(keys))
    sample(tmp_path / "teacher.yaml", run / "teacher.pt", tmp_path / "out")
    told = sample(tmp_path / "teacher.yaml", run / "teacher.pt", tmp_path / "out", "vae_scale=3", check=False)
    assert "holds samples drawn with another vae_scale" in one_line_error(told)


@pytest.mark.parametrize("given, bounds", [({}, None), ({"clip_denoised": True}, (-1, 1))])
def test_latents_are_clipped_only_if_the_configuration_says_so(tmp_path, given, bounds):
    make_vae(tmp_path / "vae")
    keys = network(SIZE) | {"vae_path": str(tmp_path / "vae")} | given
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(keys))
    student = load_experiment(tmp_path / "net.yaml").student
    assert student.process.clip_denoised is bool(given)
    assert build_network(student)[1].bounds == bounds


def test_a_relative_folder_is_found_from_the_project_and_the_working_directory(tmp_path, monkeypatch):
    make_vae(tmp_path / "project/model/vae")
    (tmp_path / "project/yaml").mkdir()
    config = tmp_path / "project/yaml/net.yaml"
    config.write_text(yaml.safe_dump(network(SIZE) | {"vae_path": "model/vae"}))
    found = str(tmp_path / "project/model/vae")
    assert load_experiment(config).student.space.vae_path == found
    make_vae(tmp_path / "here/model/vae")
    monkeypatch.chdir(tmp_path / "here")
    assert load_experiment(config).student.space.vae_path == str(tmp_path / "here/model/vae")


def test_mistakes_get_one_line(run):
    told = one_line_error(prepare(run / "tiny.yaml", "teacher.vae_path=nowhere", "--overwrite", check=False))
    assert "vae_path: no such folder: nowhere" in told
    told = one_line_error(prepare(run / "tiny.yaml", "teacher.vae_path=", "teacher.vae_scale=2", check=False))
    assert "vae_scale: does nothing without" in told


# --- training on images ----------------------------------------------------------------------------


@pytest.fixture
def baseline(tmp_path):
    """A baseline's configuration in the latents of a VAE, and nine images."""
    make_vae(tmp_path / "yaml/vae", channels=4, scaling_factor=0.5)
    keys = network(SIZE) | {"batch_size": 4, "ema_rate": "0.9", "save_interval": 2, "vae_path": "yaml/vae"}
    (tmp_path / "yaml/net.yaml").write_text(yaml.safe_dump(keys))
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    return tmp_path


def train(folder, name, *more, check=True, iterations=2):
    flags = ["--config", folder / "yaml/net.yaml", "--data_dir", folder / "images.npz"]
    flags += ["--exp_dir", folder / name, f"run.iterations={iterations}", "run.sample_interval=-1"]
    return script_here("scripts/image_train.py", *flags, *more, check=check)


def encoded(folder):
    return sorted((folder / "experiments/cache").glob("latents-*.npy"))


def test_images_are_encoded_once(baseline, monkeypatch):
    from guided_diffusion.spaces import LatentSpace

    calls, moments = [], LatentSpace.moments
    monkeypatch.setattr(LatentSpace, "moments", lambda self, x: calls.append(len(x)) or moments(self, x))
    train(baseline, "a")
    assert calls == [9, 9]  # as they are, and mirrored
    train(baseline, "b")
    assert calls == [9, 9] and len(encoded(baseline)) == 1
    train(baseline, "c", "random_flip=false")
    assert calls == [9, 9, 9] and len(encoded(baseline)) == 2
    train(baseline, "d", "vae_scale=1")
    assert calls == [9] * 5 and len(encoded(baseline)) == 3
    np.savez(baseline / "images.npz", np.load(baseline / "images.npz")["arr_0"][:8])
    train(baseline, "e")
    assert calls == [9] * 5 + [8, 8] and len(encoded(baseline)) == 4


def test_a_second_run_waits_while_the_first_encodes_the_same_images(baseline, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.5)  # after which who waits is told
    train(baseline, "a")
    (path,) = encoded(baseline)
    moments = path.read_bytes()
    path.unlink()
    first = (
        "import sys, time; from pathlib import Path; from guided_diffusion.io.files import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(3)"
    )
    with subprocess.Popen([sys.executable, "-c", first, path], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n" and other.poll() is None
        told = train(baseline, "b").stderr
        assert other.poll() == 0
    assert f"{path}: waiting: another process is writing there (process {other.pid} on " in told
    assert encoded(baseline) == [path] and path.read_bytes() == moments


def test_what_is_trained_on_is_what_encoding_the_batch_gives(baseline):
    from guided_diffusion.image_datasets import open_dataset, sample_batches
    from guided_diffusion.setups.encoding import encode_dataset

    space = build_space(load_experiment(baseline / "yaml/net.yaml").student)
    images = open_dataset(baseline / "images.npz", 16, False)
    latents = encode_dataset(images, space, True, baseline / "cache")
    options = {"seed": 3, "random_flip": True}
    plain, _ = next(sample_batches(images, 16, **options))
    moments, _ = next(sample_batches(latents, 16, **options))
    assert not th.equal(plain, next(sample_batches(images, 16, seed=3))[0])  # some are mirrored
    th.testing.assert_close(moments, space.moments(plain))
    th.manual_seed(0)
    x = space.draw(moments)
    th.manual_seed(0)
    th.testing.assert_close(x, space.encode(plain))


def test_a_baseline_resumes_exactly_and_is_sampled_from(baseline):
    train(baseline, "straight", iterations=4)
    train(baseline, "again")
    train(baseline, "again", iterations=4)
    first, again = (load_state_dict(baseline / name / "model000004.pt") for name in ("straight", "again"))
    assert all(th.equal(value, again[name]) for name, value in first.items())
    sample(baseline / "yaml/net.yaml", baseline / "again/ema_0.9_000004.pt", baseline / "samples")
    assert NpzFile(baseline / "samples/samples_5x16x16x3.npz").load("arr_0").std() > 0


def test_images_must_have_the_decoded_size(baseline):
    np.savez(baseline / "images.npz", np.zeros((9, 8, 8, 3), np.uint8))
    told = one_line_error(train(baseline, "a", check=False))
    assert "this network needs uint8 [N, 16, 16, 3]" in told


def test_a_damaged_cache_is_told(baseline):
    train(baseline, "a")
    (path,) = encoded(baseline)
    path.write_bytes(path.read_bytes()[:200])
    assert "remove it, and the images are encoded anew" in one_line_error(train(baseline, "b", check=False))
