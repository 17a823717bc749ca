"""Files of the original DKDM and TCCD repositories, as they are: configurations, checkpoints, pools."""

import collections
import os
import pickle
import re

import numpy as np
import pytest
import torch as th
import yaml
from golden_data import manifest
from in_process import script_here
from tiny import T, make_teacher, network, one_line_error, randomise

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.errors import UserError
from guided_diffusion.networks.noise_encoder import NoiseEncoder
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import HEAD_PREFIX
from guided_diffusion.script_util import build_network, build_space, create_model, model_defaults

STILL = "student.lr=1e-30"  # so small that no weight changes


def originals_tree(root, image_size=32):
    """The originals' layout and keys, with tiny networks.

    As there: every path is relative to the repository's root, celeba's diffusion file is misspelt, the
    diffusion files hold sampling options, and the 14M TCCD file says a smaller rho than its pool has.
    """
    keys = network(image_size)
    process = {key: keys.pop(key) for key in ("learn_sigma", "diffusion_steps", "noise_schedule")}
    arch = keys | {
        **{"num_heads_upsample": -1, "num_head_channels": 32, "dropout": 0.1, "class_cond": False},
        **{"use_checkpoint": False, "use_fp16": True, "use_new_attention_order": True},
    }
    diffusion = process | {
        **{"timestep_respacing": str(T), "use_ddim": False, "use_kl": False, "predict_xstart": False},
        **{"rescale_timesteps": False, "rescale_learned_sigmas": True},
        **{"clip_denoised": True, "clip_last": False, "clip_first": False},
    }
    data_set, name = ("cifar10_32", "CIFAR10-14M") if image_size == 32 else ("celeba_64", "CelebA64-57M")
    diffusion_file = f"yaml/{data_set}/{'diffusion' if image_size == 32 else 'diffsion'}.yaml"
    training = {
        **{"schedule_sampler": "uniform", "lr": 0.0001, "weight_decay": 0.0, "lr_anneal_steps": 0},
        **{"batch_size": 4, "microbatch": -1, "ema_rate": "0.9999", "resume_checkpoint": ""},
        **{"use_fp16": True, "fp16_scale_growth": 0.001, "model_path": "", "log_interval": 10},
        **{"save_interval": 10000, "cache_save_interval": -1},
        **{"model": "yaml/arch/student.yaml", "diffusion": diffusion_file},
    }
    teacher = {
        **{
            "prob": 1.0,
            "BATCH": 0.1,
            "input_perturb": 0.0,
            "batch_size": 6,
            "model_path": "model/teacher.pt",
        },
        **{
            "iter_choice": "dynamic_iterative_distillation",
            "tempfile": f"experiments/cache/{name}-0.4.cache",
        },
        **{"model": "yaml/arch/teacher.yaml", "diffusion": diffusion_file},
    }
    files = {
        "yaml/arch/teacher.yaml": arch | {"channel_mult": "1,1"},
        "yaml/arch/student.yaml": arch,
        diffusion_file: diffusion,
        f"yaml/{data_set}/teacher.yaml": {
            **{"use_fp16": True, "model": "yaml/arch/teacher.yaml", "diffusion": diffusion_file},
        },
        f"yaml/{data_set}/exp/{name}-TCCD-0.4.yaml": {"teacher": teacher, "student": training},
        f"yaml/{data_set}/exp/{name}-Baseline-0.05.yaml": training,
    }
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(yaml.safe_dump(content))
    config = root / f"yaml/{data_set}/exp/{name}-TCCD-0.4.yaml"
    (root / "model").mkdir()
    make_teacher(load_experiment(config).teacher, root / "model/teacher.pt")
    return config


@pytest.fixture(params=[32, 64])
def tree(request, tmp_path, monkeypatch):
    """The main configuration of an originals' tree, far from the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return originals_tree(tmp_path / "originals", request.param)


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return originals_tree(tmp_path)


def original_pool(path, size, image_size=32, numpy_1=False):
    """A pool as the originals write it (protocol 4, a defaultdict), by numpy 1 or 2."""
    rng = np.random.default_rng(0)
    pool = collections.defaultdict(None)
    pool["total_t"] = rng.integers(0, T + 1, size)
    pool["total_x_t_1"] = rng.standard_normal((size, 3, image_size, image_size), dtype=np.float32)
    data = pickle.dumps(pool, protocol=4)
    new, old = b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"  # after their lengths
    if new not in data:
        new, old = old, new
    assert new in data
    if numpy_1 == (old[0] == 0x15):
        data = data.replace(new, old)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return pool


# --- configurations --------------------------------------------------------------------------------


def test_a_tree_of_configurations_runs_from_anywhere(tree):
    """Prepare, distil and sample with the originals' files, their relative paths and default folders."""
    root = tree.parents[3]
    experiment = load_experiment(tree)
    assert (
        experiment.teacher.architecture.channel_mult == "1,1"
        and experiment.student.architecture.channel_mult == "1,2"
    )
    assert experiment.student.process.rescale_learned_sigmas
    assert experiment.student.architecture.use_fp16
    script_here("scripts/dynamic_prepare.py", "--config", tree)
    assert (
        len(read_pool(root / experiment.teacher.tempfile, T, build_space(experiment.student).shape)) == 2 * 4
    )
    script_here("scripts/image_kd.py", "--config", tree, "run.iterations=1", "run.sample_interval=-1")
    (run,) = (root / "experiments/kd").iterdir()
    assert run.name.startswith(f"{tree.stem},iterations=1,") and newest_checkpoint(run).step == 1
    name, size = tree.parent.parent / "teacher.yaml", experiment.student.architecture.image_size
    weights = {tree: run / "model000001.pt", name: "model/teacher.pt"}
    for config, path in weights.items():
        script_here(
            "scripts/image_sample.py", "--config", config, "--model_path", path,
            "--batch_size", 2, "--num_samples", 2, "--timestep_respacing", 2, "--use_ddim", "False",
        )  # fmt: skip
    made = {path.name for path in (root / "experiments/sample").glob("*/samples_*.npz")}
    assert made == {f"samples_2x{size}x{size}x3.npz"}
    assert len(list((root / "experiments/sample").iterdir())) == 2
    assert not list(root.parent.glob("elsewhere/*"))


def test_a_baselines_configuration(config, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    baseline = next(config.parent.glob("*-Baseline-0.05.yaml"))
    flags = ["--config", baseline, "--data_dir", tmp_path / "images.npz", "--exp_dir", tmp_path / "run"]
    script_here("scripts/image_train.py", *flags, "run.iterations=1", "run.sample_interval=-1")
    assert newest_checkpoint(tmp_path / "run").step == 1


@pytest.mark.parametrize(
    "override, told",
    [
        ("teacher.use_ddim=true", "teacher.use_ddim can only be false"),
        ("student.use_ddim=true", "student.use_ddim can only be false"),
        ("student.clip_first=true", "student.clip_first can only be false"),
        ("distill.share_equal_timesteps=true", "distill.share_equal_timesteps can only be false"),
    ],
)
def test_keys_that_are_no_choice_here_are_not_ignored(config, override, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load_experiment(config, [override])


def test_clip_last_in_a_shared_diffusion_file_is_the_students(config):
    diffusion = config.parent.parent / "diffusion.yaml"
    diffusion.write_text(diffusion.read_text().replace("clip_last: false", "clip_last: true"))
    assert load_experiment(config).student.training.clip_last


def test_absolute_paths_of_another_machine_are_named(config, tmp_path):
    absent = tmp_path / "another/machine"
    for key in ("teacher.model", "student.diffusion"):
        with pytest.raises(UserError, match=f"no such file: {absent}"):
            load_experiment(config, [f"{key}={absent}/file.yaml"])
    kd = ["scripts/image_kd.py", "--config", config]
    told = {
        f"teacher.model_path: no such file: {absent}/t.pt": [*kd, f"teacher.model_path={absent}/t.pt"],
        f"student.model_path: no such file: {absent}/s.pt": [*kd, f"student.model_path={absent}/s.pt"],
        f"no such pool: {absent}/p.cache": [*kd, f"teacher.tempfile={absent}/p.cache"],
        f"no such checkpoint: {absent}/model000001.pt": [
            *(*kd, f"student.resume_checkpoint={absent}/model000001.pt"),
        ],
        f"--model_path: no such file: {absent}/s.pt": [
            *("scripts/image_sample.py", "--config", config, "--model_path", f"{absent}/s.pt"),
        ],
    }
    for expected, command in told.items():
        assert expected in one_line_error(script_here(*command, check=False))
    assert not absent.parent.exists()


# --- checkpoints -----------------------------------------------------------------------------------


def original_student(config, dtype=th.float32):
    """Weights of a student and its noise encoder under the original's names."""
    th.manual_seed(1)
    model, _ = build_network(load_experiment(config).student)
    encoder = NoiseEncoder(model.feature_shape, model.emb_dim)
    state = dict(randomise(model).state_dict())
    state |= {HEAD_PREFIX + k: v for k, v in encoder.state_dict().items()}
    return {k: v.to(dtype) for k, v in state.items()}


def body_of(state):
    return {k: v.float() for k, v in state.items() if not k.startswith(HEAD_PREFIX)}


def head_of(state, prefix=HEAD_PREFIX):
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        th.testing.assert_close(a[key], b[key], rtol=0, atol=1e-20)


def load(path):
    return th.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [th.float16, th.float32])
def test_resuming_an_original_student(config, tmp_path, dtype):
    """U-Net, noise encoder, averages and pool go on from where the original's run stood."""
    state, average = original_student(config, dtype), original_student(config, dtype)
    average = {k: v + 1 for k, v in average.items()}
    folder = tmp_path / "original-run"
    folder.mkdir()
    th.save(state, folder / "model000003.pt")
    th.save(average, folder / "ema_0.9999_000003.pt")
    pool = original_pool(folder / "teacher-state-000003.cache", 8, numpy_1=True)
    done = script_here(
        "scripts/image_kd.py", "--config", config, "--resume_checkpoint", folder / "model000003.pt",
        "--exp_dir", tmp_path / "run", STILL, "run.iterations=4", "run.sample_interval=-1",
    )  # fmt: skip
    assert "resumed from step 3" in done.stdout and "started anew: opt, head" in done.stdout
    run = tmp_path / "run"
    assert_same(load(run / "model000004.pt"), body_of(state))
    assert_same(head_of(load(run / "head000004.pt"), "noise_encoder."), head_of(state))
    expected = body_of(average)
    for name, value in load(run / "ema_0.9999_000004.pt").items():
        expected[name].lerp_(body_of(state)[name], 1 - 0.9999)
        th.testing.assert_close(value, expected[name])
    later = read_pool(run / "teacher-state-000004.cache", T, (3, 32, 32))
    kept = (later.x.numpy() == pool["total_x_t_1"]).all((1, 2, 3))
    assert kept.sum() == 4 and np.array_equal(later.levels.numpy()[kept], pool["total_t"][kept])


@pytest.mark.parametrize("dtype", [th.float16, th.float32])
def test_an_original_student_as_initial_weights_and_for_sampling(config, tmp_path, dtype):
    state = original_student(config, dtype)
    th.save(state, tmp_path / "student.pt")
    original_pool(tmp_path / load_experiment(config).teacher.tempfile, 8)
    script_here(
        "scripts/image_kd.py", "--config", config, "student.model_path=student.pt", STILL,
        "--exp_dir", tmp_path / "run", "run.iterations=1", "run.sample_interval=-1",
    )  # fmt: skip
    assert_same(load(tmp_path / "run/model000001.pt"), body_of(state))
    assert_same(head_of(load(tmp_path / "run/head000001.pt"), "noise_encoder."), head_of(state))

    samples = []
    for name, path in (("theirs", tmp_path / "student.pt"), ("ours", tmp_path / "run/model000001.pt")):
        flags = [
            "--batch_size",
            2,
            "--num_samples",
            2,
            "--timestep_respacing",
            2,
            "--log_dir",
            tmp_path / name,
        ]
        script_here("scripts/image_sample.py", "--config", config, "--model_path", path, *flags)
        samples.append(np.load(tmp_path / name / "samples_2x32x32x3.npz")["arr_0"])
    assert np.array_equal(*samples)  # the noise encoder is not part of sampling


@pytest.mark.parametrize("flat", [False, True])
def test_resuming_with_an_originals_optimizer(config, tmp_path, flat):
    """It knows parameters by their place alone; a 16-bit run's holds two flat copies of them."""
    state, model = original_student(config), build_network(load_experiment(config).student)[0]
    encoder = NoiseEncoder(model.feature_shape, model.emb_dim)
    parameters = [*model.named_parameters(), *encoder.named_parameters(HEAD_PREFIX.rstrip("."))]
    assert [name for name, _ in parameters] == list(state)
    gradients = [th.full_like(parameter, number + 1.0) for number, (_, parameter) in enumerate(parameters)]
    if flat:  # first all of at most one dimension, then the others, each in order
        small = th.cat([gradient for gradient in gradients if gradient.ndim <= 1])
        gradients = [small, th.cat([g.flatten() for g in gradients if g.ndim > 1]).reshape(1, -1)]
    masters = [th.nn.Parameter(th.zeros_like(gradient)) for gradient in gradients]
    theirs = th.optim.AdamW(masters, lr=1e-4, weight_decay=0.0)
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    theirs.step()
    th.save(state, tmp_path / "model000003.pt")
    th.save(theirs.state_dict(), tmp_path / "opt000003.pt")
    original_pool(tmp_path / "teacher-state-000003.cache", 8)
    script_here(
        "scripts/image_kd.py", "--config", config, "--resume_checkpoint", tmp_path / "model000003.pt",
        "--exp_dir", tmp_path / "run", STILL, "run.iterations=4", "run.sample_interval=-1",
    )  # fmt: skip
    later = load(tmp_path / "run/opt000004.pt")["optimizer"]["state"]
    assert len(later) == len(parameters)
    for number, (name, parameter) in enumerate(parameters):
        assert later[number]["exp_avg"].shape == parameter.shape
        assert later[number]["step"] == 2, name
        before = 1e-3 * (number + 1) ** 2  # the second moment, of which the new step leaves 0.999
        assert float(later[number]["exp_avg_sq"].min()) >= 0.9989 * before, name


def test_the_originals_order_of_parameters():
    case = manifest("g4_tccd.json")["cases"]["T1"]
    arch = {key: value for key, value in case["student_arch"].items() if key in model_defaults()}
    model = create_model(**arch, learn_sigma=case["diffusion"]["learn_sigma"])
    encoder = NoiseEncoder(model.feature_shape, model.emb_dim)
    ours = [*model.named_parameters(), *encoder.named_parameters(HEAD_PREFIX.rstrip("."))]
    assert [name for name, _ in ours] == [name for name, *_ in case["keys"]]


# --- pools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, numpy_1", [(8, True), (32, False)])
def test_an_original_pool_trains(config, tmp_path, size, numpy_1):
    """rho 0.1 of T = 20 needs 2 batches of 4; of the 8 batches of rho 0.4 the first are read, as there."""
    path = tmp_path / load_experiment(config).teacher.tempfile
    pool = original_pool(path, size, numpy_1=numpy_1)
    before = path.read_bytes()
    flags = ["run.iterations=1", "run.sample_interval=-1", "--exp_dir", tmp_path / "run"]
    script_here("scripts/image_kd.py", "--config", config, *flags)
    later = read_pool(tmp_path / "run/teacher-state-000001.cache", T, (3, 32, 32))
    assert len(later) == 8
    kept = (later.x.numpy() == pool["total_x_t_1"][:8]).all((1, 2, 3))
    assert kept.sum() == 4
    assert np.array_equal(later.levels.numpy()[kept], pool["total_t"][:8][kept])
    assert path.read_bytes() == before


def test_an_original_pool_is_shared_among_ranks(config, tmp_path):
    path = tmp_path / load_experiment(config).teacher.tempfile
    pool = original_pool(path, 32)
    shares = [
        read_pool(path, T, (3, 32, 32), expected={"size": 16}, rank=rank, world_size=2) for rank in (0, 1)
    ]
    assert np.array_equal(th.cat([share.levels for share in shares]), pool["total_t"][:16])
    assert np.array_equal(th.cat([share.x for share in shares]), pool["total_x_t_1"][:16])


class Calls:
    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


def test_pools_that_are_none_are_refused_in_one_line(config, tmp_path):
    path = tmp_path / load_experiment(config).teacher.tempfile
    pool = original_pool(path, 8)
    good = path.read_bytes()
    bad = {
        "hostile": (
            pickle.dumps(pool | {"extra": Calls(os.mkdir, str(tmp_path / "ran"))}),
            "nothing in it was run",
        ),
        "hostile array": (
            pickle.dumps(pool | {"total_t": Calls(eval, "print('ran')")}),
            "nothing in it was run",
        ),
        "torch": (pickle.dumps({"total_t": th.zeros(8), "total_x_t_1": th.zeros(8, 3, 32, 32)}), "refused"),
        "short": (good[: len(good) // 2], "truncated"),
        "few": (pickle.dumps({k: v[:7] for k, v in pool.items()}), "holds 7 samples"),
        "small": (pickle.dumps(pool | {"total_x_t_1": pool["total_x_t_1"][..., 1:]}), "holds samples"),
        "levels": (pickle.dumps(pool | {"total_t": pool["total_t"] + T}), f"outside 0..{T}"),
        "scalar": (pickle.dumps(pool | {"total_t": np.int64(3)}), "'total_t' must be int64 [8]"),
        "half levels": (pickle.dumps(pool | {"total_t": pool["total_t"] / 2}), "'total_t' must be int64 [8]"),
        "other": (pickle.dumps({"data": np.zeros(3)}), "is no pool"),
        "list": (pickle.dumps([1, 2]), "is no pool"),
    }
    for name, (data, told) in bad.items():
        path.write_bytes(data)
        done = script_here("scripts/image_kd.py", "--config", config, "run.iterations=1", check=False)
        line = one_line_error(done)
        assert str(path) in line and told in line, name
        assert "ran" not in done.stdout.split()
    assert not (tmp_path / "ran").exists()
