"""Variants of the dynamic batch through the real scripts: ranks, policies, options, classes, wrong pools."""

import hashlib

import numpy as np
import pytest
import torch as th
import yaml
from in_process import script_here
from safetensors import safe_open
from tiny import T, distillation, make_teacher, network, one_line_error, script

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.io.description import read_description
from guided_diffusion.logger import read_progress

SIZE, B = 8, 4
ONE = ["run.iterations=1"]


def tiny(folder, **more):
    folder.mkdir(exist_ok=True)
    return distillation(folder, image_size=SIZE, **more)


def pool_of(folder, **more):
    return read_pool(folder / "pool.cache", T, (3, SIZE, SIZE), **more)


def state_of(run, step):
    return read_pool(run / f"teacher-state-{step:06d}.cache", T, (3, SIZE, SIZE))


def rows(pool):
    """Each sample with its level and label as bytes, sorted: what a pool holds, whatever the order."""
    y = [-1] * len(pool) if pool.y is None else pool.y.tolist()
    return sorted(
        (x.numpy().tobytes(), t, c) for x, t, c in zip(pool.x, pool.levels.tolist(), y, strict=True)
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- a pool prepared by N ranks and trained by M; 2 and 2 below, with classes ----------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Configurations whose pools were prepared by 1 and by 2 ranks."""
    configs = {ranks: tiny(tmp_path_factory.mktemp(f"prepared-by-{ranks}")) for ranks in (1, 2)}
    script_here("scripts/dynamic_prepare.py", "--config", configs[1])
    script("scripts/dynamic_prepare.py", "--config", configs[2], ranks=2)
    return configs


@pytest.mark.parametrize("prepared_by, trained_by", [(1, 2), (2, 1)])
def test_a_pool_goes_from_any_number_of_ranks_to_any(prepared, prepared_by, trained_by, tmp_path):
    config = prepared[prepared_by]
    whole, before = pool_of(config.parent), digest(config.parent / "pool.cache")
    assert len(whole) == len(set(rows(whole))) == round(0.4 * T) * B
    assert_shares_make_up(whole, config.parent)
    kd = ["scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", "run.iterations=1"]
    if trained_by == 1:
        script_here(*kd)
    else:
        script(*kd, ranks=trained_by)
    assert_one_batch_advanced(whole, state_of(tmp_path / "run", 1), trained_by)
    assert digest(config.parent / "pool.cache") == before


def assert_shares_make_up(whole, folder):
    """No sample is lost or read twice, whatever the number of ranks."""
    for world in (1, 2, 4):
        shares = [pool_of(folder, rank=rank, world_size=world) for rank in range(world)]
        assert {len(share) for share in shares} == {len(whole) // world}
        assert sorted(row for share in shares for row in rows(share)) == rows(whole)


def assert_one_batch_advanced(before, after, ranks):
    """B samples, equally many of each rank, went one step further; all others are where they were."""
    assert after.x.shape == before.x.shape
    changed = (after.x != before.x).flatten(1).any(1)
    assert changed.reshape(ranks, -1).sum(1).tolist() == [B // ranks] * ranks
    assert th.equal(before.levels - after.levels, changed.long())


# --- policies and options --------------------------------------------------------------------------


def test_shuffled_with_every_option_on_two_ranks(tmp_path):
    config = tiny(
        tmp_path,
        teacher__iter_choice="shffled_iterative_distillation",
        teacher__prob=0.5,
        teacher__input_perturb=0.1,
        distill__stride=5,
        distill__pool_dtype="float16",
    )
    script_here("scripts/dynamic_prepare.py", "--config", config)
    with safe_open(tmp_path / "pool.cache", framework="pt") as file:
        stored = file.get_tensor("total_x_t_1")
    assert stored.dtype == th.float16
    pool = pool_of(tmp_path)
    assert len(pool) == B and th.equal(pool.x, stored)
    assert int(pool.levels.min()) >= 1 and int(pool.levels.max()) <= T - 1
    script("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", ranks=2)
    later = state_of(tmp_path / "run", 6)  # the pool is always used whole: every sample moves together
    steps = (pool.levels - later.levels) % T
    per_rank = steps.reshape(2, -1)
    assert th.equal(per_rank, per_rank[:, :1].expand_as(per_rank))
    assert not th.equal(later.x, pool.x)


@pytest.mark.slow
def test_iterative_on_two_ranks(tmp_path):
    """No pool: all samples walk down from T together."""
    config = tiny(tmp_path, teacher__iter_choice="iterative_distillation", teacher__tempfile="")
    refused = script_here("scripts/dynamic_prepare.py", "--config", config, check=False)
    assert "nothing to prepare" in one_line_error(refused)
    script("scripts/image_kd.py", "--config", config, "--exp_dir", tmp_path / "run", ranks=2)
    later = state_of(tmp_path / "run", 6)
    assert later.levels.tolist() == [T - 6] * B
    assert len(set(rows(later))) == B  # each rank has samples of its own


def test_a_process_of_one_step_has_no_pool(tmp_path):
    done = script_here(
        "scripts/dynamic_prepare.py", "--config", tiny(tmp_path), *both("timestep_respacing=1"), check=False
    )
    assert "teacher.timestep_respacing: leaves one step" in one_line_error(done)


@pytest.fixture
def config(tmp_path):
    config = tiny(tmp_path)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    return config


def distil(config, name, *overrides):
    """Distil in this process; the pool and the weights after it."""
    run, steps = config.parent / name, load_experiment(config, overrides).run.iterations
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", run, *overrides)
    return state_of(run, steps), th.load(run / f"model{steps:06d}.pt", weights_only=True)


OPTIONS = [
    *("distill.advance_stride=4", "distill.loss_weight=v"),
    *("distill.stage2_time=between", "distill.stage2_fraction=0.5", "distill.role_vector=true"),
]


@pytest.mark.parametrize("key", ["dropout", "class_dropout_prob"])
def test_entries_do_not_follow_what_dropout_makes_of_a_student(prepared_at_8, key):
    keys = ["class_cond=true", "num_classes=3", "null_class=true"]
    flags = [f"{section}.{k}" for section in ("teacher", "student") for k in keys]
    flags += ["distill.on_policy=0.5", f"student.{key}=0.1"]
    done = script_here("scripts/image_kd.py", "--config", prepared_at_8, *flags, check=False)
    told = f"distill.on_policy follows what the student predicts: student.{key} must be 0"
    assert told in one_line_error(done)


@pytest.mark.parametrize("weight, warned", [("eps", True), ("min_snr", False)])
def test_a_student_that_predicts_x_0_is_told_which_weights_it_learns_by(
    prepared_at_8, tmp_path, weight, warned
):
    flags = ["--config", prepared_at_8, "--exp_dir", tmp_path / "run", "run.iterations=1"]
    flags += ["student.prediction_type=sample", f"distill.loss_weight={weight}"]
    done = script_here("scripts/image_kd.py", *flags)
    assert ("give distill.loss_weight=min_snr" in done.stdout) == warned


@pytest.mark.parametrize(
    "options, told",
    [
        pytest.param(["distill.on_policy=0.7"], "on-policy 0.7", marks=pytest.mark.slow),
        (
            ["distill.on_policy=0.7", "distill.teacher_interval=2"],
            "the teacher every 2 iterations, on-policy 0.7",
        ),
    ],
)
def test_options_of_the_pool_resume_exactly_with_classes_16_bits_and_respacing(tmp_path, options, told):
    config = tiny(tmp_path, class_cond=True, num_classes=3, distill__pool_dtype="float16")
    more = [*OPTIONS, *options, "teacher.timestep_respacing=10", "student.timestep_respacing=10"]
    script_here("scripts/dynamic_prepare.py", "--config", config, *more)
    kd = ["scripts/image_kd.py", "--config", config, *more, "student.save_interval=2"]
    script(*kd, "--exp_dir", tmp_path / "whole", ranks=2)
    log = (tmp_path / "whole/log.txt").read_text()
    assert f"stage 2 between t and T, loss weight v, hops of 4, {told}" in log
    before, after = (
        read_pool(tmp_path / "whole" / f"teacher-state-00000{n}.cache", 10, (3, SIZE, SIZE)) for n in (4, 6)
    )
    assert after.x.dtype == th.float16 and (before.levels - after.levels).abs().max() > 1
    resumed = [*kd, "--resume_checkpoint", tmp_path / "whole/model000004.pt", "--exp_dir", tmp_path / "again"]
    script(*resumed, ranks=2)
    for name in ("model000006.pt", "ema_0.99_000006.pt"):
        one, two = (th.load(tmp_path / run / name, weights_only=True) for run in ("whole", "again"))
        assert all(th.equal(one[key], two[key]) for key in one)
    pools = [
        read_pool(tmp_path / run / "teacher-state-000006.cache", 10, (3, SIZE, SIZE))
        for run in ("whole", "again")
    ]
    assert all(th.equal(getattr(pools[0], key), getattr(pools[1], key)) for key in ("x", "levels", "y"))
    kept = [vars(pool.replay) if pool.replay else {} for pool in pools]
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) == (len(options) == 2)
    assert all(th.equal(kept[0][key], kept[1][key]) for key in kept[0] if kept[0][key] is not None)


def test_answers_kept_by_16_bit_networks_resume_exactly(tmp_path):
    """Whose results lie channels last, where those from a file do not."""
    config = tiny(tmp_path, teacher__use_fp16=True, student__use_fp16=True)
    more = ["distill.teacher_interval=2", "run.precision=bf16", "student.save_interval=2"]
    script_here("scripts/dynamic_prepare.py", "--config", config, *more)
    whole, weights = distil(config, "whole", *more)
    resumed = ["--resume_checkpoint", config.parent / "whole/model000004.pt", "--exp_dir", tmp_path / "again"]
    script_here("scripts/image_kd.py", "--config", config, *more, *resumed)
    again = th.load(tmp_path / "again/model000006.pt", weights_only=True)
    assert all(th.equal(weights[name], again[name]) for name in weights)
    kept, same = vars(whole.replay), vars(state_of(tmp_path / "again", 6).replay)
    assert len(whole.replay) == 3 * B
    assert all(th.equal(kept[name], same[name]) for name in kept if kept[name] is not None)


def test_an_older_checkpoint_does_not_go_on_among_later_ones(config):
    """Which would be the newest ones of the run, whatever it saved."""
    distil(config, "later", "run.iterations=4", "student.save_interval=2")
    run = config.parent / "later"
    resume = ["scripts/image_kd.py", "--config", config, "--resume_checkpoint", run / "model000002.pt"]
    refused = script_here(*resume, "run.iterations=3", check=False)
    assert refused.returncode == 1 and "holds later checkpoints, up to step 4" in refused.stderr
    branch = [*resume, "--exp_dir", config.parent / "branch"]
    script_here(*branch, "run.iterations=3")
    assert (config.parent / "branch/model000003.pt").is_file()
    again = script_here(*branch, "run.iterations=5")  # the same command goes on
    assert f"resumed from step 3 of {config.parent / 'branch'}" in again.stdout
    itself = ["--resume_checkpoint", config.parent / "branch", "run.iterations=6"]
    script_here("scripts/image_kd.py", "--config", config, *itself)
    again = script_here(*branch, "run.iterations=7")  # and still does
    assert f"resumed from step 6 of {config.parent / 'branch'}" in again.stdout


def test_a_run_goes_on_with_the_stages_that_it_has(config):
    distil(config, "staged", "run.iterations=2", "student.save_interval=2")
    run = config.parent / "staged"
    assert read_description(run / "model000002.pt")["method"].startswith(
        "distilled by TCCD, without any data"
    )
    flags = ["--exp_dir", run, "run.iterations=4", "distill.stage1_weight=0"]
    line = one_line_error(script_here("scripts/image_kd.py", "--config", config, *flags, check=False))
    assert "a run goes on with the stages, or the schedule_sampler, that it has" in line


@pytest.mark.slow
def test_a_run_goes_on_in_float16_from_an_arithmetic_without_loss_scale(tmp_path):
    """As `precision: auto` does on a GPU without bfloat16."""
    config = tiny(tmp_path, teacher__use_fp16=True, student__use_fp16=True)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    distil(config, "run", "run.precision=bf16", "run.iterations=2")
    distil(config, "run", "run.precision=fp16", "run.iterations=3")
    assert "no loss scale so far" in (config.parent / "run/log.txt").read_text()
    state = th.load(config.parent / "run/opt000003.pt", weights_only=True)
    assert state["scaler"]["scale"] > 0


def test_answers_that_do_not_suit_a_run_are_not_kept(config):
    more = ["distill.teacher_interval=3", "run.iterations=2"]
    distil(config, "small", *more)
    resume = ["--resume_checkpoint", config.parent / "small/model000002.pt", "run.iterations=5"]
    large = ["distill.teacher_interval=3", f"student.batch_size={2 * B}"]
    run = config.parent / "large"
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", run, *large, *resume)
    assert len(state_of(run, 5).replay) == 4 * B  # of steps 2 and 3; the B before are too few for a batch


def test_prob_walks_further_between_the_batches(config):
    before = pool_of(config.parent)
    total = {}
    for prob in (1.0, 0.3):
        after, _ = distil(config, f"prob{prob}", f"teacher.prob={prob}", "run.iterations=3")
        total[prob] = int(((before.levels - after.levels) % T).sum())
    assert total[1.0] == 3 * B  # at level 0 a sample starts again at T
    assert total[0.3] > total[1.0] and total[0.3] % B == 0  # whole batches go on


def test_input_perturb_changes_what_the_student_sees_alone(config):
    plain, weights = distil(config, "plain", *ONE)
    perturbed, others = distil(config, "perturbed", "teacher.input_perturb=0.5", *ONE)
    assert rows(plain) == rows(perturbed)
    assert any(not th.equal(weights[name], others[name]) for name in weights)


def test_half_precision_storage_rounds_and_halves_the_file(config, tmp_path):
    whole, size = pool_of(tmp_path), (tmp_path / "pool.cache").stat().st_size
    script_here("scripts/dynamic_prepare.py", "--config", config, "distill.pool_dtype=float16", "--overwrite")
    rounded = pool_of(tmp_path)
    assert th.equal(rounded.x, whole.x.half()) and th.equal(rounded.levels, whole.levels)
    assert (tmp_path / "pool.cache").stat().st_size < 0.6 * size
    after, _ = distil(config, "run", *ONE)  # storage is no part of what a pool belongs to
    assert after.x.dtype == th.float32
    after, _ = distil(config, "half", "distill.pool_dtype=float16", *ONE)
    assert after.x.dtype == th.float16


def test_a_strided_pool_covers_all_levels_with_fewer_calls(config, tmp_path, monkeypatch):
    from guided_diffusion.unet import UNetModel

    calls, forward = [], UNetModel.forward
    monkeypatch.setattr(UNetModel, "forward", lambda *args, **more: calls.append(1) or forward(*args, **more))
    counts = []
    for stride in (1, 5):
        calls.clear()
        flags = ["--config", config, f"distill.stride={stride}", "teacher.BATCH=2", "--overwrite"]
        script_here("scripts/dynamic_prepare.py", *flags)
        counts.append(len(calls))
        assert pool_of(tmp_path).levels.unique().tolist() == list(range(1, T))
    assert counts[1] < counts[0] / 3
    distil(config, "run", "distill.stride=5", "teacher.BATCH=2", *ONE)


# --- classes ---------------------------------------------------------------------------------------


def test_class_conditional_from_training_the_teacher_to_samples(tmp_path):
    """Train a teacher on labelled images, prepare, distil and sample on two ranks: labels all the way."""
    teacher = network(SIZE, class_cond=True, num_classes=3)
    training = {"batch_size": 4, "lr": 1e-3, "ema_rate": "0.9", "save_interval": 2}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher | training))
    images = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images, np.arange(9) % 3)
    data = ["--data_dir", tmp_path / "images.npz"]
    script_here(
        "scripts/image_train.py", "--config", tmp_path / "teacher.yaml", *data,
        "--exp_dir", tmp_path / "teacher", "run.iterations=2", "run.sample_interval=-1",
    )  # fmt: skip

    config = tiny(tmp_path / "distil", class_cond=True, num_classes=3)
    weights = f"teacher.model_path={tmp_path / 'teacher/model000002.pt'}"
    one = [weights, "run.iterations=1"]
    script("scripts/dynamic_prepare.py", "--config", config, weights, ranks=2)
    pool = pool_of(config.parent)
    assert pool.y.dtype == th.int64 and set(pool.y.tolist()) == {0, 1, 2}
    assert_shares_make_up(pool, config.parent)

    run = tmp_path / "run"
    script("scripts/image_kd.py", "--config", config, *one, "--exp_dir", run, ranks=2)
    assert_one_batch_advanced(pool, state_of(run, 1), 2)
    assert th.equal(state_of(run, 1).y, pool.y)  # a label stays with its place

    script(
        "scripts/image_sample.py", "--config", config, "--model_path", run / "model000001.pt",
        "--batch_size", 2, "--num_samples", 7, "--timestep_respacing", 2, "--log_dir", tmp_path / "samples",
        ranks=2,
    )  # fmt: skip
    with np.load(tmp_path / "samples" / f"samples_7x{SIZE}x{SIZE}x3.npz") as samples:
        assert samples["arr_0"].shape == (7, SIZE, SIZE, 3)
        assert samples["arr_1"].shape == (7,) and samples["arr_1"].dtype == np.int64
        assert set(samples["arr_1"].tolist()) <= {0, 1, 2}


def test_a_pool_without_labels_is_no_pool_of_a_class_conditional_teacher(config):
    overrides = [
        f"{section}.{key}"
        for section in ("teacher", "student")
        for key in ("class_cond=true", "num_classes=3")
    ]
    weights = config.parent / "with-classes.pt"
    make_teacher(load_experiment(config, overrides).teacher, weights)
    overrides.append(f"teacher.model_path={weights}")
    done = script_here("scripts/image_kd.py", "--config", config, *overrides, *ONE, check=False)
    assert "was made for class_cond False" in one_line_error(done)


# --- wrong pools -----------------------------------------------------------------------------------


def both(*overrides):
    return [f"{section}.{override}" for section in ("teacher", "student") for override in overrides]


@pytest.mark.parametrize(
    "overrides, told",
    [
        (both("diffusion_steps=30"), "was made for T 20, this run has 30"),
        (both("timestep_respacing=10"), "was made for timestep_respacing '', this run has '10'"),
        (both("image_size=16", "attention_resolutions=8"), "was made for image_size 8, this run has 16"),
        (["teacher.BATCH=0.2"], "was made for rho 0.4, this run has 0.2"),
        (both("rescale_timesteps=true"), "was made for rescale_timesteps False, this run has True"),
        (both("clip_denoised=false"), "was made for clip_denoised True, this run has False"),
        (["student.batch_size=8"], "was made for batch_size 4, this run has 8"),
        (["distill.stride=2"], "was made for stride 1, this run has 2"),
        (["teacher.iter_choice=shuffled_iterative_distillation"], "was made for iter_choice"),
        (["teacher.model_path=other.pt"], "was made for teacher_sha256"),
    ],
)
def test_a_pool_of_something_else_is_refused(config, monkeypatch, overrides, told):
    monkeypatch.chdir(config.parent)
    weights = th.load("teacher.pt", weights_only=True)
    th.save({name: value + 1e-3 for name, value in weights.items()}, "other.pt")
    for name in ("scripts/dynamic_prepare.py", "scripts/image_kd.py"):
        done = script_here(name, "--config", config, *overrides, check=False)
        line = one_line_error(done)
        assert told in line and "pool.cache" in line


@pytest.mark.slow
def test_every_rank_leaves_when_a_pool_is_refused(config):
    done = script("scripts/image_kd.py", "--config", config, "teacher.BATCH=0.2", ranks=2, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "was made for rho 0.4, this run has 0.2" in done.stderr


def test_what_stage_1_cannot_compare_is_told(config):
    done = script_here(
        *("scripts/image_kd.py", "--config", config, "--exp_dir", config.parent / "single"),
        *("student.microbatch=1", "run.iterations=1"),
    )
    assert "WARNING: stage 1 compares a sample with the others of its piece" in done.stdout


def test_a_mistake_before_the_first_iteration_leaves_no_directory(config):
    done = script_here("scripts/image_kd.py", "--config", config, "teacher.BATCH=0.2", check=False)
    assert "was made for rho" in one_line_error(done)
    assert not [*(config.parent / "experiments").glob("kd/*")]


def test_a_learning_rate_that_ends_before_the_run_is_told(config):
    flags = ["scripts/image_kd.py", "--config", config, "--exp_dir", config.parent / "annealed"]
    flags += ["student.log_interval=1", "run.warmup_steps=0", "student.lr=0.25"]
    done = script_here(*flags, "run.iterations=4", "student.lr_anneal_steps=2")
    assert "WARNING: the learning rate is 0 after 2 iterations (lr_anneal_steps), of 4" in done.stdout
    rates = [row["lr"] for row in read_progress(config.parent / "annealed/progress.csv")]
    assert rates == [0.25, 0.25, 0.125, 0.0]  # each the step's own


def test_the_teachers_file_is_no_pool(tmp_path):
    config = tiny(tmp_path)
    teacher = tmp_path / load_experiment(config).teacher.model_path
    flags = ["scripts/dynamic_prepare.py", "--config", config, f"teacher.tempfile={teacher}", "--overwrite"]
    before = digest(teacher)
    assert "is the teacher's; name another file" in one_line_error(script_here(*flags, check=False))
    assert digest(teacher) == before
