"""Checkpoints, samples and pools know what they are of: contradictions are refused, wrong scores traced."""

import json
import re
import subprocess

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from tiny import ROOT, distillation, network, one_line_error

from guided_diffusion.config.loading import experiment_text, load_distillation, load_experiment
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.pool_file import read_pool_header, write_pool
from guided_diffusion.errors import UserError
from guided_diffusion.io.description import described, read_description
from guided_diffusion.io.torch_file import StateDict
from guided_diffusion.runs.provenance import described_experiment, git_revision
from guided_diffusion.runs.run_directory import _of_configuration
from guided_diffusion.runs.weights import require_agreement
from guided_diffusion.script_util import build_network


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a baseline's configuration and two steps of its training."""
    folder = tmp_path_factory.mktemp("trained")
    keys = network(8, attention_resolutions="4") | {"batch_size": 4, "ema_rate": "0.9", "save_interval": 2}
    (folder / "net.yaml").write_text(yaml.safe_dump(keys))
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images)
    train(folder, "run")
    return folder


def train(folder, name, *overrides):
    flags = ["--config", folder / "net.yaml", "--data_dir", folder / "images.npz", "--exp_dir", folder / name]
    script_here("scripts/image_train.py", *flags, "run.iterations=2", "run.sample_interval=-1", *overrides)
    return th.load(folder / name / "model000002.pt", weights_only=True)


def sample(folder, out, *more, check=True):
    return script_here(
        "scripts/image_sample.py", "--config", folder / "net.yaml", "--log_dir", out, "--num_samples", 3,
        "--model_path", folder / "run/ema_0.9_000002.pt", *more, check=check,
    )  # fmt: skip


@pytest.mark.parametrize(
    "override, told",
    [
        ("noise_schedule=linear", "was trained with noise_schedule 'cosine', but noise_schedule is 'linear'"),
        ("diffusion_steps=30", "was trained with diffusion_steps 20, but diffusion_steps is 30"),
        ("rescale_timesteps=true", "was trained with rescale_timesteps False, but rescale_timesteps is True"),
        ("prediction_type=v_prediction", "was trained with prediction_type 'epsilon'"),
        (
            "predict_xstart=true",
            "was trained with prediction_type 'epsilon', but prediction_type is 'sample'",
        ),
        ("num_heads=4", "was trained with num_heads 2, but num_heads is 4"),
        ("use_new_attention_order=true", "was trained with use_new_attention_order False"),
    ],
)
def test_a_wrong_process_or_architecture_is_refused(trained, tmp_path, override, told):
    """None of these changes a name or shape, and each samples garbage."""
    line = one_line_error(sample(trained, tmp_path, override, check=False))
    assert "ema_0.9_000002.pt" in line and told in line
    assert not list(tmp_path.glob("*.npz"))


def test_a_wrong_process_of_a_teacher_or_of_initial_weights_is_refused(trained, tmp_path):
    config = distillation(tmp_path, 8)
    weights = trained / "run/model000002.pt"
    keys = network(8, attention_resolutions="4") | {"noise_schedule": "linear"}
    both = [f"{section}.{k}={v}" for section in ("teacher", "student") for k, v in keys.items()]
    flags = ["scripts/dynamic_prepare.py", "--config", config, *both, f"teacher.model_path={weights}"]
    line = one_line_error(script_here(*flags, check=False))
    assert "noise_schedule 'cosine', but teacher.noise_schedule is 'linear'" in line
    flags = ["--config", trained / "net.yaml", "--data_dir", trained / "images.npz", f"model_path={weights}"]
    flags += ["--exp_dir", tmp_path / "run", "noise_schedule=linear", "run.iterations=1"]
    line = one_line_error(script_here("scripts/image_train.py", *flags, check=False))
    assert "was trained with noise_schedule 'cosine'" in line


def test_what_may_differ_between_training_and_use(trained, tmp_path):
    free = ["dropout=0.5", "use_checkpoint=true", "timestep_respacing=5", "num_classes=7", "use_fp16=true"]
    sample(trained, tmp_path, *free)


def test_samples_of_another_process_are_no_samples_of_this_one(trained, tmp_path):
    sample(trained, tmp_path)
    line = one_line_error(sample(trained, tmp_path, "clip_denoised=false", check=False))
    assert "holds samples drawn with another clip_denoised" in line
    sample(trained, tmp_path, "dropout=0.5", "num_classes=7")  # which are none of the samples' business


def test_samples_carry_where_they_come_from(trained, tmp_path):
    sample(trained, tmp_path, "--timestep_respacing", "5", "--sampler", "ddim", "run.seed=3")
    with np.load(tmp_path / "samples_3x8x8x3.npz") as archive:
        provenance = json.loads(str(archive["provenance"]))
    assert provenance == json.loads((tmp_path / "sampling.json").read_text())
    assert (provenance["sampler"], provenance["seed"], len(provenance["timesteps"])) == ("ddim", 3, 5)
    assert provenance["process"]["noise_schedule"] == "cosine" and provenance["config"] == "net"
    assert provenance["checkpoint"]["step"] == 2 and provenance["checkpoint"]["config"] == "net"
    assert provenance["checkpoint"]["space"] == {"kind": "pixels", "shape": [3, 8, 8]}
    assert {"revision", "model_sha256", "clip_denoised", "dtype"} <= set(provenance)


def test_a_runs_own_configuration_has_the_runs_name(trained):
    assert load_experiment(trained / "run/config.yaml").name == "net"
    assert read_description(trained / "run/model000002.pt")["method"] == "trained from data"


def test_a_checkpoint_needs_no_configuration_as_a_teacher(trained, tmp_path):
    """As a folder of diffusers' does not; and what contradicts it is told."""
    teacher = {"model_path": str(trained / "run/model000002.pt"), "BATCH": 0.1, "batch_size": 4}
    student = network(8, 16, attention_resolutions="4") | {"batch_size": 4}
    for name in ("image_size", "diffusion_steps", "noise_schedule", "learn_sigma"):
        student.pop(name, None)
    config = tmp_path / "kd.yaml"
    config.write_text(yaml.safe_dump({"teacher": teacher, "student": student}))
    found, known = load_distillation(config), load_experiment(trained / "net.yaml").student
    assert found.teacher.architecture == known.architecture and found.teacher.process == known.process
    assert found.student.process.diffusion_steps == known.process.diffusion_steps
    script_here(
        "scripts/dynamic_prepare.py", "--config", config, f"teacher.tempfile={tmp_path / 'pool.cache'}"
    )
    with pytest.raises(UserError, match=r"teacher.diffusion_steps is 30, but .*model000002.pt says 20"):
        load_distillation(config, ["teacher.diffusion_steps=30"])


def test_a_checkpoint_below_the_home_folder_says_what_it_is(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(trained))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model_path": "~/run/ema_0.9_000002.pt"}))
    assert load_experiment(tmp_path / "c.yaml").student.architecture.image_size == 8


def test_other_images_begin_another_run(trained, tmp_path):
    """And where a directory is named, it says that they changed."""
    np.savez(tmp_path / "others.npz", np.load(trained / "images.npz")["arr_0"][::-1])
    (tmp_path / "net.yaml").write_text((trained / "net.yaml").read_text())
    flags = ["scripts/image_train.py", "--config", tmp_path / "net.yaml", "run.sample_interval=-1"]
    first = ["--data_dir", trained / "images.npz", "--exp_dir", tmp_path / "experiments/train/net-1"]
    script_here(*flags, *first, "run.iterations=2")
    record = tmp_path / "experiments/train/net-1/run.json"
    assert json.loads(record.read_text())["data_dir"] == str((trained / "images.npz").resolve())
    on = script_here(*flags, *first[2:], "--data_dir", tmp_path / "others.npz", "run.iterations=3").stdout
    assert f"data_dir {trained / 'images.npz'} -> {tmp_path / 'others.npz'}" in on
    line = one_line_error(script_here(*flags, "--data_dir", "", check=False))
    assert "--data_dir: no such file or folder: ''" in line


def test_unfinished_runs_are_found_by_their_images_too(tmp_path):
    experiment = load_experiment(ROOT / "yaml/digits_16/exp/digits-teacher.yaml")
    run = tmp_path / f"{experiment.name}-1"
    run.mkdir()
    (run / "config.yaml").write_text(experiment_text(experiment))
    record = {"started": "now", "ended": "stopped", "data_dir": "/a"}
    for told, expected in (({"data_dir": "/a"}, [run]), ({"data_dir": "/b"}, [])):
        (run / "run.json").write_text(json.dumps(record))
        assert list(_of_configuration(tmp_path, experiment, told)) == expected
    (run / "run.json").write_text(json.dumps({"started": "now", "ended": "stopped"}))  # of an older version
    assert list(_of_configuration(tmp_path, experiment, {"data_dir": "/b"})) == [run]


def test_steps_that_a_network_does_not_know_are_refused(trained, tmp_path):
    state = th.load(trained / "run/ema_0.9_000002.pt", weights_only=True)
    description = read_description(trained / "run/ema_0.9_000002.pt")
    description["process"]["timestep_respacing"] = "5"
    th.save(described(state, description), tmp_path / "few.pt")
    flags = ["scripts/image_sample.py", "--model_path", tmp_path / "few.pt", "--num_samples", 2, "--log_dir"]
    line = one_line_error(script_here(*flags, tmp_path / "a", "--timestep_respacing", 7, check=False))
    assert "the network knows the 5 steps of timestep_respacing 5 alone" in line
    script_here(*flags, tmp_path / "b")


def test_help_has_the_keys_that_training_on_images_takes():
    text = script_here("scripts/image_train.py", "--help").stdout
    assert (
        "  random_flip = True: " in text and "  run.seed = 0: " in text and "cache_save_interval" not in text
    )


def test_looking_for_the_revision_runs_nothing_of_the_folder(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'trapped'}\n")
    hook.chmod(0o755)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    subprocess.run(["git", "-C", tmp_path, "config", "core.fsmonitor", str(hook)], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision(tmp_path))
    assert not (tmp_path / "trapped").exists()


def test_for_other_programs_a_checkpoint_is_a_plain_state_dict(trained):
    state = th.load(trained / "run/model000002.pt", weights_only=True)
    model, _ = build_network(load_experiment(trained / "net.yaml").student)
    model.load_state_dict(state)
    assert list(state) == list(model.state_dict())
    assert read_description(trained / "run/model000002.pt")["process"]["diffusion_steps"] == 20


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("architecture", "num_res_blocks", 10**9),
        ("architecture", "image_size", 10**9),
        ("process", "diffusion_steps", 10**12),
    ],
)
def test_a_description_of_absurd_size_is_refused_before_it_is_built(trained, tmp_path, part, key, value):
    path = trained / "run/model000002.pt"
    description = read_description(path)
    description[part][key] = value
    th.save(described(th.load(path, weights_only=True), description), tmp_path / "huge.pt")
    flags = ["--model_path", tmp_path / "huge.pt", "--log_dir", tmp_path / "out"]
    line = one_line_error(script_here("scripts/image_sample.py", *flags, check=False))
    assert key in line and str(value) in line


@pytest.mark.parametrize(
    "part, value, told",
    [
        ("process", {"model_path": "someone/tracker"}, "does not know (model_path)"),
        ("process", {"model": "/etc/hostname"}, "does not know (model)"),
        ("process", {"noise_schedule": "${oc.env:HOME}"}, "does not know (noise_schedule)"),
        ("run", {"seed": 3}, ""),
        ("config", "../../escaped", ""),
        ("config", "a\0b", ""),
        ("config", "my run (1)", ""),
    ],
)
def test_a_description_names_no_other_files(trained, tmp_path, monkeypatch, part, value, told):
    path = trained / "run/model000002.pt"
    description = read_description(path)
    description[part] = {**description.get(part, {}), **value} if isinstance(value, dict) else value
    th.save(described(th.load(path, weights_only=True), description), tmp_path / "odd.pt")
    if told:
        with pytest.raises(UserError, match=re.escape(told)):
            described_experiment(tmp_path / "odd.pt")
    else:
        experiment = described_experiment(tmp_path / "odd.pt")
        assert experiment.run.seed == 0
        names = {"../../escaped": "unnamed", "a\0b": "unnamed"}
        assert experiment.name == (names.get(value, value) if part == "config" else "net")


def test_a_damaged_description_is_told(trained, tmp_path):
    th.save(described({"w": th.zeros(1)}, {"process": 3}), tmp_path / "odd.pt")
    flags = ["--model_path", tmp_path / "odd.pt"]
    line = one_line_error(
        script_here("scripts/image_sample.py", "--config", trained / "net.yaml", *flags, check=False)
    )
    assert "odd.pt: what it says of itself is damaged" in line
    state = StateDict()
    assert state.metadata is None


def test_baselines_mirror_images_unless_told_not_to(trained):
    usual, again, straight = (
        train(trained, "a"),
        train(trained, "b"),
        train(trained, "c", "random_flip=false"),
    )
    assert all(th.equal(usual[name], again[name]) for name in usual)
    assert any(not th.equal(usual[name], straight[name]) for name in usual)


def test_clip_last_reaches_the_bound_of_baselines(trained):
    plain, clipped = train(trained, "d"), train(trained, "e", "clip_last=true")
    assert any(not th.equal(plain[name], clipped[name]) for name in plain)


def test_a_pool_is_of_a_seed(tmp_path):
    config = distillation(tmp_path, 8)
    kd = ["scripts/image_kd.py", "--config", config, "run.iterations=1"]
    script_here("scripts/dynamic_prepare.py", "--config", config)
    first = (tmp_path / "pool.cache").read_bytes()
    line = one_line_error(script_here(*kd, "run.seed=1", check=False))
    assert "no such pool" in line and "pool-seed1.cache" in line
    done = script_here("scripts/dynamic_prepare.py", "--config", config, "run.seed=1")
    assert "seed 1" in done.stdout
    assert (tmp_path / "pool.cache").read_bytes() == first
    assert (tmp_path / "pool-seed1.cache").read_bytes() != first
    assert read_pool_header(tmp_path / "pool-seed1.cache")["seed"] == 1
    done = script_here(*kd, "run.seed=1", "--exp_dir", tmp_path / "one")
    assert "(seed 1)" in done.stdout
    done = script_here(*kd, "run.seed=1", "distill.pool_seed=0", "--exp_dir", tmp_path / "zero")
    assert "(seed 0)" in done.stdout


@pytest.mark.parametrize(
    "override, told",
    [
        ("teacher.prediction_type=v_prediction", "prediction_type 'epsilon', this run has 'v_prediction'"),
        ("teacher.num_heads=1", "architecture.num_heads 2, this run has 1"),
        ("teacher.use_new_attention_order=true", "use_new_attention_order False, this run has True"),
    ],
)
def test_a_pool_is_of_one_reading_of_the_teacher(tmp_path, override, told):
    """Neither a name nor a shape of the weights shows it, nor does a bare state dict say it."""
    config = distillation(tmp_path, 8)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    for script in ("scripts/dynamic_prepare.py", "scripts/image_kd.py"):
        line = one_line_error(script_here(script, "--config", config, override, check=False))
        assert f"was made for {told}" in line or f"was made for architecture.{told}" in line
    header = read_pool_header(tmp_path / "pool.cache")
    older = {key: value for key, value in header.items() if not key.startswith(("arch", "pred"))}
    pool = DynamicBatch.of_noise(header["size"], (3, 8, 8), 20)
    pool.levels.fill_(7)
    write_pool(tmp_path / "pool.cache", [pool], older)  # which did not say it
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.iterations=1")


def test_betas_of_the_schedule_itself_are_the_same_said_or_not(tmp_path):
    keys = {"diffusion_steps": 1000, "noise_schedule": "linear"}
    more = {f"{section}__{k}": v for section in ("teacher", "student") for k, v in keys.items()}
    config = distillation(tmp_path, 8, **more)
    said = ["teacher.beta_start=1e-4", "teacher.beta_end=0.020000000000000018"]
    plain, given = load_distillation(config), load_distillation(config, said)
    assert plain == given and given.teacher.process.beta_range == (0.0001, 0.02)
    other = load_distillation(config, [f"{section}.beta_end=0.03" for section in ("teacher", "student")])
    assert other.teacher.process.beta_range == (0.0001, 0.03)
    network, _ = build_network(plain.student)
    description = {"process": {"beta_start": 0.0001, "beta_end": 0.02, "diffusion_steps": 1000}}
    th.save(described(network.state_dict(), description), tmp_path / "older.pt")
    require_agreement(plain.student, tmp_path / "older.pt")
    with pytest.raises(UserError, match=r"was trained with beta_end 0\.0, but beta_end is 0\.03"):
        require_agreement(other.student, tmp_path / "older.pt")
    pool = DynamicBatch.of_noise(8, (3, 8, 8), 1000)
    write_pool(tmp_path / "p.cache", [pool], {"T": 1000, "noise_schedule": "linear", "beta_end": 0.02})
    assert read_pool_header(tmp_path / "p.cache") == {"T": 1000, "noise_schedule": "linear"}


def test_a_pool_that_says_impossible_things_of_itself_is_told(tmp_path):
    pool = DynamicBatch(th.zeros(2, 3, 8, 8), th.zeros(2, dtype=th.int64), 20)
    write_pool(tmp_path / "pool.cache", [pool], {"T": "many", "noise_schedule": "linear"})
    with pytest.raises(UserError, match=r"pool\.cache: not a readable pool"):
        read_pool_header(tmp_path / "pool.cache")


def test_a_pool_that_does_not_say_its_seed_serves_all(tmp_path):
    config = distillation(tmp_path, 8)
    pool = DynamicBatch.of_noise(32, (3, 8, 8), 20)
    pool.levels.fill_(7)
    write_pool(tmp_path / "pool.cache", [pool], {})
    script_here(
        "scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.seed=5",
        "run.iterations=1",
    )  # fmt: skip


def test_a_student_without_a_process_has_its_teachers(tmp_path):
    config = distillation(tmp_path, 8)
    tree = yaml.safe_load(config.read_text())
    tree["teacher"] |= {"beta_start": 0.001, "noise_schedule": "scaled_linear", "timestep_respacing": "10"}
    for name in ("learn_sigma", "diffusion_steps", "noise_schedule"):
        del tree["student"][name]
    config.write_text(yaml.safe_dump(tree))
    experiment = load_distillation(config)
    assert experiment.student.process == experiment.teacher.process


@pytest.mark.parametrize(
    "override, told",
    [
        ("teacher.dropout=0.1", "dropout does nothing there"),
        ("teacher.use_checkpoint=true", "use_checkpoint does nothing there"),
        ("student.random_flip=false", "random_flip does nothing there"),
        ("teacher.sigma_small=true", "sigma_small: does nothing with learn_sigma"),
        ("teacher.beta_start=0.1", "beta_start: the cosine schedule has none"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(tmp_path, override, told):
    done = script_here(
        "scripts/dynamic_prepare.py", "--config", distillation(tmp_path, 8), override, check=False
    )
    assert told in one_line_error(done)


def test_a_baselines_pool_key_is_refused(trained):
    done = sample(trained, trained / "none", "cache_save_interval=3", check=False)
    assert "cache_save_interval does nothing there" in one_line_error(done)


def test_the_evaluators_record_has_it_too(tmp_path):
    """From the embedded teacher's npz to the record: nothing has to be typed again."""
    script_here(
        "scripts/image_sample.py", "--config", ROOT / "yaml/digits_16/teacher.yaml", "--num_samples", 20,
        "--model_path", ROOT / "model/digits_teacher.pt", "--timestep_respacing", 2, "--log_dir", tmp_path,
    )  # fmt: skip
    samples = tmp_path / "samples_20x16x16x3.npz"
    record = tmp_path / "record.json"
    flags = [samples, samples, "--backend", "digits", "--no_cache", "--output", record]
    done = script_here("evaluations/evaluator.py", *flags)
    assert "samples made by: model digits_teacher.pt, noise_schedule cosine, diffusion_steps" in done.stdout
    result = json.loads(record.read_text())
    result = result[0] if isinstance(result, list) else result.get("results", [result])[0]
    assert result["samples_provenance"] == json.loads((tmp_path / "sampling.json").read_text())


def test_a_pool_without_a_file_is_told(tmp_path):
    config = distillation(tmp_path, 8)
    for script in ("scripts/dynamic_prepare.py", "scripts/image_kd.py"):
        line = one_line_error(script_here(script, "--config", config, "teacher.tempfile=", check=False))
        assert "teacher.tempfile is not set" in line
    chain = ["teacher.iter_choice=iterative_distillation", "teacher.tempfile=", "run.iterations=1"]
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", *chain)


def test_the_key_that_goes_with_a_checkpoint_is_one_that_the_command_takes(trained, tmp_path):
    config = distillation(tmp_path, 8, student__noise_schedule="linear", teacher__noise_schedule="linear")
    flags = ["scripts/image_sample.py", "--config", config, "--model_path", trained / "run/model000002.pt"]
    line = one_line_error(script_here(*flags, "--log_dir", tmp_path / "samples", check=False))
    assert "student.noise_schedule=cosine goes with it" in line
