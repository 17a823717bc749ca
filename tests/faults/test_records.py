"""What a run's folder says of it stays true; what cannot be right is not written."""

import json
import shutil
import subprocess

import pytest
import torch as th
from driver import distil, run, train
from tiny import ROOT, distillation

from guided_diffusion.distill.pool_file import read_pool_header
from guided_diffusion.runs.provenance import git_revision


def records(folder):
    return {name: (folder / name).read_bytes() for name in ("config.yaml", "run.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished distillation of four iterations: its folder, and its command without --exp_dir."""
    folder = tmp_path_factory.mktemp("finished")
    command = distil(folder)
    code, text = run(folder, *command, "--exp_dir", folder / "run", "run.iterations=4")
    assert code == 0, text
    return folder, command


@pytest.fixture
def copied(finished, tmp_path):
    """The same run, to be tried anew; its folder, and the command with --exp_dir."""
    folder, command = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    return tmp_path, [*command, "--exp_dir", tmp_path / "run"]


@pytest.mark.parametrize("override", ["student.num_channels=64", "teacher.num_channels=64"])
def test_a_refused_attempt(copied, override):
    folder, command = copied
    before = records(folder / "run")
    code, text = run(folder, *command, "run.iterations=6", override)
    assert code == 1 and "Traceback" not in text, text
    assert records(folder / "run") == before
    assert "ended: " in (folder / "run/log.txt").read_text().splitlines()[-1]


def test_nothing_left_to_do(copied):
    folder, command = copied
    before = records(folder / "run")
    code, text = run(folder, *command, "run.iterations=1", "student.lr=1")
    assert code == 0 and "nothing left to do: 4 iterations are done, of 1" in text
    assert records(folder / "run") == before


def test_a_run_that_was_killed_when_all_was_done_has_finished(copied):
    folder, command = copied
    path = folder / "run/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": "still running, or killed"}))
    code, text = run(folder, *command, "run.iterations=4")
    assert code == 0 and "nothing left to do" in text
    assert json.loads(path.read_text())["ended"] == "finished"


def test_a_configuration_in_the_runs_own_folder_is_not_replaced(finished, tmp_path):
    _, command = finished
    own = tmp_path / "config.yaml"
    own.write_text("# my notes\n" + command[2].read_text())
    before = own.read_bytes()
    code, text = run(tmp_path, command[0], "--config", own, "--exp_dir", tmp_path)
    assert code == 1 and "its config.yaml is not a run's" in text
    assert own.read_bytes() == before


def test_a_distillation_is_not_continued_on_images(copied, tmp_path):
    """A student that is said to be free of data would have seen some."""
    folder, _ = copied
    (tmp_path / "images").mkdir()
    command = train(tmp_path / "images")
    before = records(folder / "run")
    code, text = run(tmp_path, *command, "--exp_dir", folder / "run")
    assert code == 1 and "is a distillation, which image_kd.py continues" in text
    assert records(folder / "run") == before


def test_images_are_not_continued_by_distillation(finished, tmp_path):
    (tmp_path / "images").mkdir()
    code, text = run(tmp_path, *train(tmp_path / "images"), "--exp_dir", tmp_path / "run", "run.iterations=2")
    assert code == 0, text
    code, text = run(tmp_path, *finished[1], "--exp_dir", tmp_path / "run")
    assert code == 1 and "is a training on images, which image_train.py continues" in text


def test_another_teachers_pool_is_refused(copied, finished):
    """The states of a run that is continued are its own teacher's."""
    folder, command = copied
    weights = th.load(finished[0] / "teacher.pt", weights_only=True)
    th.save({name: 2 * value for name, value in weights.items()}, folder / "other.pt")
    other = [*command, "run.iterations=5", f"teacher.model_path={folder / 'other.pt'}"]
    code, text = run(folder, *other)
    assert code == 1 and "was made for teacher_sha256" in text, text
    assert "teacher_sha256" in read_pool_header(folder / "run/teacher-state-000004.cache")


def test_the_revision_is_the_librarys(tmp_path):
    """Not that of a repository in which a user keeps configurations."""
    folder, git = tmp_path / "yaml", ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    folder.mkdir()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "mine"], check=True)
    code, text = run(folder, *distil(folder), "--exp_dir", tmp_path / "run", "run.iterations=1")
    assert code == 0, text
    found = json.loads((tmp_path / "run/run.json").read_text())["git_revision"]
    assert found == git_revision(ROOT) != git_revision(tmp_path)


def test_a_teacher_without_finite_numbers(tmp_path):
    command = distil(tmp_path)
    weights = th.load(tmp_path / "teacher.pt", weights_only=True)
    weights[next(iter(weights))][...] = float("nan")
    th.save(weights, tmp_path / "nan.pt")
    keys = [f"teacher.model_path={tmp_path / 'nan.pt'}", f"teacher.tempfile={tmp_path / 'nan.cache'}"]
    code, text = run(tmp_path, "scripts/dynamic_prepare.py", *command[1:], *keys)
    assert (
        code == 1 and "the teacher gives no finite numbers" in text and not (tmp_path / "nan.cache").exists()
    )
    flags = ["--model_path", tmp_path / "nan.pt", "--num_samples", "2", "--log_dir", tmp_path / "out"]
    code, text = run(tmp_path, "scripts/image_sample.py", "--config", command[2], *flags)
    assert code == 1 and "the network gives no finite numbers" in text
    assert not list((tmp_path / "out").glob("samples_*.npz"))


def test_a_schedule_that_ends_in_noise_alone_says_so(tmp_path):
    """abar_T = 0: x_0 from a prediction of the noise is 0 / 0."""
    keys = {f"{part}__noise_schedule": "linear" for part in ("teacher", "student")}
    code, text = run(tmp_path, "scripts/dynamic_prepare.py", "--config", distillation(tmp_path, 8, **keys))
    assert code == 1 and "its noise schedule ends in noise alone" in text, text


def test_a_run_whose_every_iteration_was_skipped_fails(tmp_path):
    command = [*distil(tmp_path), "--exp_dir", tmp_path / "run", "run.iterations=3", "student.lr=1e30"]
    code, text = run(tmp_path, *command, "student.ema_rate=0.9", "distill.stage1_weight=1e38")
    assert code == 1 and "gradients were not finite for 3 iterations in a row" in text, text


def test_a_folder_as_the_pools_file(tmp_path):
    command = ["scripts/dynamic_prepare.py", *distil(tmp_path)[1:], f"teacher.tempfile={tmp_path}"]
    code, text = run(tmp_path, *command)
    assert code == 1 and "is a folder; name a file to write" in text and "preparing" not in text
