"""The scripts as users run them: one process, mpiexec -n 1 and -n 2, any working directory."""

import csv

import numpy as np
import pytest
import torch as th
from in_process import script_here
from tiny import ROOT, T, distillation, network, one_line_error, script

from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.logger import read_progress
from guided_diffusion.runs.checkpoint import newest_checkpoint


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_prepare_distil_sample(tmp_path, ranks):
    config = distillation(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = script("scripts/dynamic_prepare.py", "--config", config, ranks=ranks, cwd=elsewhere)
    assert "wrote" in done.stdout
    pool = read_pool(tmp_path / "pool.cache", T, (3, 16, 16))
    assert len(pool) == 8 * 4  # round(0.4 x 20) batches of 4
    assert pool.levels.min() >= 1 and pool.levels.max() <= T - 1
    again = script("scripts/dynamic_prepare.py", "--config", config, ranks=ranks)
    assert "already prepared" in again.stdout
    assert not list(tmp_path.glob("*.part"))

    run = tmp_path / "run"
    done = script(
        "scripts/image_kd.py", "--config", config, "--exp_dir", run, "run.sample_interval=0",
        "run.sample_respacing=3", "run.num_samples=2", ranks=ranks, cwd=elsewhere,
    )  # fmt: skip
    assert f"{ranks or 1} rank(s)" in done.stdout
    assert "TCCD" in done.stdout
    names = {path.name for path in run.iterdir()}
    for step in ("000004", "000006"):
        assert {f"model{step}.pt", f"ema_0.9_{step}.pt", f"ema_0.99_{step}.pt", f"opt{step}.pt"} <= names
        assert {f"head{step}.pt", f"teacher-state-{step}.cache", f"checkpoint{step}.json"} <= names
    assert {"config.yaml", "log.txt", "progress.csv", "curves.png", "samples000006.png"} <= names
    assert "model000007.pt" not in names and "model000008.pt" not in names
    rows = list(csv.DictReader((run / "progress.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert {"stage1_mse", "stage1_vb", "stage1_align", "stage2_mse", "stage2_vb", "grad_norm"} <= set(rows[0])
    assert len(read_pool(run / "teacher-state-000006.cache", T, (3, 16, 16))) == 32
    assert not any(k.startswith("out_embed") for k in th.load(run / "model000006.pt", weights_only=True))

    sampled = script(
        "scripts/image_sample.py", "--config", config, "--model_path", run / "ema_0.99_000006.pt",
        "--batch_size", 3, "--num_samples", 7, "--timestep_respacing", 4, "--use_ddim", "False",
        "--log_dir", tmp_path / "samples", ranks=ranks, cwd=elsewhere,
    )  # fmt: skip
    path = tmp_path / "samples" / "samples_7x16x16x3.npz"
    assert str(path) in sampled.stdout
    with np.load(path) as archive:
        assert archive["arr_0"].shape == (7, 16, 16, 3)
        assert archive["arr_0"].dtype == np.uint8
    assert (tmp_path / "samples" / "samples.png").exists()


@pytest.mark.slow
def test_a_run_resumes_exactly(tmp_path):
    """Six iterations straight, and four, then two more by the same command: the same bits."""
    config = distillation(tmp_path, student__dropout=0.1, distill__role_vector=True)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", straight)
    script_here("scripts/image_kd.py", "--config", config, "--exp_dir", halves, "run.iterations=4")
    done = script_here("scripts/image_kd.py", "--config", config, "--exp_dir", halves)
    assert "resumed from step 4" in done.stdout
    for name in ("model", "ema_0.9_", "ema_0.99_", "opt", "head"):
        a, b = (th.load(run / f"{name}000006.pt", weights_only=True) for run in (straight, halves))
        assert_same(a, b)
    a, b = (read_pool(run / "teacher-state-000006.cache", T, (3, 16, 16)) for run in (straight, halves))
    assert th.equal(a.x, b.x) and th.equal(a.levels, b.levels)
    rows = [read_progress(run / "progress.csv") for run in (straight, halves)]
    for row in [*rows[0], *rows[1]]:
        del row["iterations_per_second"], row["seconds"]
    assert rows[0] == rows[1]
    finished = script_here("scripts/image_kd.py", "--config", config, "--exp_dir", halves)
    assert "step 7" not in finished.stdout
    assert newest_checkpoint(halves).step == 6


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b)
    else:
        assert a == b


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """One iteration on the same pool entries: two ranks with half the batch each give one rank's step."""
    config = distillation(
        tmp_path,
        teacher__iter_choice="shuffled_iterative_distillation",
        distill__gather_negatives=True,
        distill__role_vector=True,
        student__weight_decay=0.01,
    )
    script_here("scripts/dynamic_prepare.py", "--config", config)
    runs = []
    for ranks in (1, 2):
        runs.append(tmp_path / f"run{ranks}")
        script(
            "scripts/image_kd.py", "--config", config, "--exp_dir", runs[-1], "run.iterations=1", ranks=ranks
        )
    first, second = (th.load(run / "opt000001.pt", weights_only=True)["optimizer"]["state"] for run in runs)
    largest = max(float(first[i]["exp_avg"].abs().max()) for i in first)
    for i in first:  # after one step exp_avg is a tenth of the gradient, the noise encoder's included
        th.testing.assert_close(first[i]["exp_avg"], second[i]["exp_avg"], atol=1e-6 * largest, rtol=1e-4)


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    config = distillation(tmp_path)
    drawn = []
    for batch, ranks in ((5, 0), (2, 0), (3, 2)):
        folder = tmp_path / f"samples{batch}"
        script(
            "scripts/image_sample.py", "--config", config, "--model_path", tmp_path / "teacher.pt",
            "--batch_size", batch, "--num_samples", 5, "--timestep_respacing", 4, "--log_dir", folder,
            ranks=ranks,
        )  # fmt: skip
        drawn.append(np.load(folder / "samples_5x16x16x3.npz")["arr_0"].astype(int))
    for other in drawn[1:]:
        assert np.abs(drawn[0] - other).max() <= 1  # the last bit, where a batch size takes another kernel
    assert np.abs(drawn[0][0] - drawn[0][1]).max() > 1


def test_sampling_continues_where_it_stopped(tmp_path):
    config = distillation(tmp_path)
    flags = ["--config", config, "--model_path", tmp_path / "teacher.pt", "--timestep_respacing", 4]
    flags += ["--num_samples", 9, "--batch_size", 2]
    whole, folder = tmp_path / "whole", tmp_path / "samples"
    script_here("scripts/image_sample.py", *flags, "--log_dir", whole)
    script_here("scripts/image_sample.py", *flags, "--log_dir", folder)
    final = folder / "samples_9x16x16x3.npz"
    images = np.load(final)["arr_0"]
    final.unlink()
    (folder / "shards").mkdir()
    from guided_diffusion.io.npz_writer import create_npz

    for start, stop in ((2, 4), (6, 8)):
        with create_npz(folder / "shards" / f"{start}-{stop}.npz", stop - start) as writer:
            writer.append(images[start:stop])
    done = script_here("scripts/image_sample.py", *flags, "--log_dir", folder)
    assert "continuing: 4 of 9 images are drawn already" in done.stdout
    assert final.read_bytes() == (whole / "samples_9x16x16x3.npz").read_bytes()
    other = script_here("scripts/image_sample.py", *flags, "--log_dir", folder, "run.seed=1", check=False)
    assert "another seed" in one_line_error(other)


@pytest.mark.parametrize("ranks", [0, 2])
def test_training_on_images(tmp_path, ranks):
    import yaml

    keys = network(8, attention_resolutions="4", class_cond=True, num_classes=3)
    keys |= {"lr": 1e-3, "batch_size": 4, "microbatch": 2, "log_interval": 1, "save_interval": 2}
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(keys | {"run": {"iterations": 3, "sample_interval": -1}}))
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images, np.arange(10) % 3)
    run = tmp_path / "run"
    flags = ["--config", config, "--data_dir", tmp_path / "images.npz", "--exp_dir", run]
    script("scripts/image_train.py", *flags, ranks=ranks)
    assert newest_checkpoint(run).step == 3
    flags[3] = tmp_path / "nowhere"
    assert "no such file or folder" in one_line_error(
        script_here("scripts/image_train.py", *flags, check=False)
    )


def test_a_teacher_beside_its_configuration(tmp_path, monkeypatch):
    """Whatever the working directory, where no yaml/ tree says what the project is."""
    config = distillation(tmp_path, 8)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = script_here("scripts/dynamic_prepare.py", "--config", config, "teacher.model_path=teacher.pt")
    assert f"wrote {tmp_path / 'pool.cache'}" in done.stdout


def test_mistakes_get_one_line(tmp_path):
    config = distillation(tmp_path)
    kd = ["scripts/image_kd.py", "--config", config]
    told = {
        "no such pool": [*kd],
        "unknown key 'student.lrr'": [*kd, "student.lrr=1"],
        "unrecognized arguments: --nonsense": [*kd, "--nonsense"],
        "lr is a key of the configuration: student.lr=VALUE": [*kd, "--lr", "1e-3"],
        "teacher.use_fp16=VALUE or student.use_fp16=VALUE": [*kd, "--use_fp16=True"],
        "did you mean --exp_dir?": [*kd, "--expdir", "x"],
        "no such configuration file": ["scripts/image_kd.py", "--config", tmp_path / "absent.yaml"],
        "the following arguments are required: --config": ["scripts/image_kd.py"],
        "teacher.model_path: no such file": [*kd, "teacher.model_path=absent.pt"],
        "does not fit the configured network": [*kd, "teacher.num_channels=64"],
        "no such checkpoint": [*kd, "--resume_checkpoint", tmp_path / "absent"],
        "needs a 'teacher' section": ["scripts/dynamic_prepare.py", "--config", baseline(tmp_path)],
        "'x' is neither True nor False": [
            *("scripts/image_sample.py", "--config", config, "--model_path", "m", "--use_ddim", "x"),
        ],
        "'-1' is no whole number": [
            *("scripts/image_train.py", "--config", config, "--data_dir", "x", "--num_workers", "-1"),
        ],
        "run.eval_reference: no such file": [*kd, "run.eval_interval=1", "run.eval_reference=a/absent.npz"],
        f"{config} is a file, and a folder is wanted": [*kd, "--exp_dir", config],
        "gs://a/b: a URL cannot be used here": ["scripts/report.py", tmp_path, "--out", "gs://a/b"],
        "is no name of a page": ["scripts/report.py", tmp_path, "--out", tmp_path / "run.json"],
        "is the name of images": [
            *("evaluations/evaluator.py", "a.npz", "b.npz", "--backend", "digits", "--output", "a.npz"),
        ],
        "holds no results, and would be replaced": [
            *("evaluations/evaluator.py", "a.npz", "b.npz", "--backend", "digits", "--output", config),
        ],
        "is no pool, and would be replaced": [
            *("scripts/dynamic_prepare.py", "--config", config, f"teacher.tempfile={config}", "--overwrite"),
        ],
        "the demo is of the digits": ["scripts/demo.py", "--config", "digits_32/exp/digits32-TCCD.yaml"],
        "error: --timestep_respacing '30'": [
            *("scripts/image_sample.py", "--config", config, "--model_path", tmp_path / "teacher.pt"),
            *("--timestep_respacing", "30"),
        ],
    }
    for expected, command in told.items():
        assert expected in one_line_error(script_here(*command, check=False)), expected
    for folder in ("scripts", "datasets", "evaluations", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if "__main__" in path.read_text():
                error = one_line_error(script_here(f"{folder}/{path.name}", "--nonsense", check=False))
                assert "required" in error or "--nonsense" in error, path
    odd = script(
        "scripts/dynamic_prepare.py", "--config", config, "student.batch_size=3", ranks=2, check=False
    )
    assert "cannot be divided evenly among 2 ranks" in one_line_error(odd)


def test_a_pool_of_something_else_is_refused(tmp_path):
    config = distillation(tmp_path)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    for override, told in {
        "teacher.BATCH=0.2": "was made for rho 0.4, this run has 0.2",
        "student.batch_size=8": "was made for batch_size 4",
        "distill.stride=5": "was made for stride 1",
    }.items():
        done = script_here("scripts/image_kd.py", "--config", config, override, check=False)
        assert told in one_line_error(done)
    th.save({k: v + 1 for k, v in th.load(tmp_path / "teacher.pt").items()}, tmp_path / "teacher.pt")
    assert "teacher_sha256" in one_line_error(
        script_here("scripts/image_kd.py", "--config", config, check=False)
    )


def baseline(folder):
    import yaml

    path = folder / "baseline.yaml"
    path.write_text(yaml.safe_dump(network()))
    return path
