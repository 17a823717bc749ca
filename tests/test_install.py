"""The wheel: built, installed into an environment of its own, and used from folders that hold nothing."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import ROOT, one_line_error

from guided_diffusion import __version__
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.paths import find_config
from guided_diffusion.errors import UserError

SOURCES = [  # all that a wheel is built from
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("guided_diffusion", "evaluations", "tccd", "scripts", "datasets", "yaml", "model"),
]
TINY = [  # of yaml/digits_16/exp/digits-TCCD.yaml
    *(
        "teacher.timestep_respacing=20",
        "student.timestep_respacing=20",
        "teacher.BATCH=0.1",
        "distill.stride=1",
    ),
    *("distill.advance_stride=1", "student.batch_size=4", "run.iterations=2", "run.warmup_steps=0"),
    *("student.lr_anneal_steps=2", "run.sample_interval=-1"),
]


PREFIX = Path(sys.prefix)


class Installed:
    """The wheel, and an environment in which it is installed beside this one's dependencies.

    Args:
        folder: where both are made.
    """

    def __init__(self, folder):
        source = folder / "source"
        source.mkdir()
        for name in SOURCES:
            path, ignore = ROOT / name, shutil.ignore_patterns("__pycache__", "*.npz")
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, source / name, **({"ignore": ignore} if path.is_dir() else {}))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
        self.finish([*pip, *build])
        (self.wheel,) = folder.glob("*.whl")
        self.environment = folder / "venv"
        venv.create(self.environment, with_pip=False)
        python = self.environment / "bin/python"
        self.finish([*pip, "--python", python, "install", "--no-deps", "--no-index", self.wheel])
        (self.site,) = self.environment.glob("lib/python*/site-packages")
        # After the installation, which would take this environment's own for an earlier one.
        (self.site / "dependencies.pth").write_text(f"{Path(np.__file__).parents[1]}\n")

    def finish(self, command, cwd=None, check=True, threads="1"):
        """Run a command to its end, without this checkout on its path; of `threads`, "" for all cores."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"OMP_NUM_THREADS": threads} if threads else {}
        env |= {"PATH": f"{PREFIX / 'bin'}{os.pathsep}{env['PATH']}"}
        env["LD_LIBRARY_PATH"] = str(PREFIX / "lib")  # mpi4py looks for mpich in its own environment alone
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def tccd(self, *args, cwd, ranks=0, check=True, threads="1"):
        """Run the console command."""
        launcher = ["mpiexec", "-n", ranks] if ranks else []
        return self.finish([*launcher, self.environment / "bin/tccd", *args], cwd, check, threads)

    def files(self):
        """What is installed."""
        return {p for p in self.site.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def metadata(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_what_the_commands_need_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"guided_diffusion", "evaluations", "tccd"}
    assert {"guided_diffusion/py.typed", "evaluations/py.typed"} <= names
    library = [
        p for folder in ("guided_diffusion", "evaluations", "tccd") for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    library += [*ROOT.glob("guided_diffusion/reports/page.*"), *ROOT.glob("guided_diffusion/kernels/*.c")]
    shipped = [
        p for pattern in ("scripts/*.py", "datasets/*.py", "yaml/**/*.yaml") for p in ROOT.glob(pattern)
    ]
    models = [f"tccd/model/digits{name}.pt" for name in ("_teacher", "32_teacher", "_classifier")]
    expected = {p.relative_to(ROOT).as_posix() for p in library}
    expected |= {f"tccd/{p.relative_to(ROOT).as_posix()}" for p in shipped}
    assert names - {"guided_diffusion/py.typed", "evaluations/py.typed"} == expected | {
        *models,
        "tccd/model/README.md",
    }


def test_what_the_wheel_says_of_itself(metadata):
    assert metadata["Name"] == "guided-diffusion-tccd" and metadata["Version"] == __version__
    extras = {"eval", "mpi", "diffusers", "remote", "wandb", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert {"Programming Language :: Python :: 3.10", "Programming Language :: Python :: 3.13"} <= set(
        metadata.get_all("Classifier")
    )
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_oldest_versions_are_the_lower_bounds(metadata):
    """`make test-oldest` installs exactly what the wheel allows at least; of torch there is no CPU build."""
    lines = (ROOT / "requirements-oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    oldest = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    bounds = {}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if 'extra == "docs"' not in str(requirement.marker):
            (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
            bounds[requirement.name] = Version(bound)
    assert oldest.pop("torch") > bounds.pop("torch")
    tools = {"ruff", "mypy"}  # run by `make lint` alone
    assert oldest.keys() - {"setuptools"} == bounds.keys() - tools
    assert all(oldest[name] == bounds[name] for name in bounds.keys() - tools)


def test_help_lists_every_command_with_a_line(installed, tmp_path):
    listed = installed.tccd("--help", cwd=tmp_path).stdout
    assert listed == installed.tccd(cwd=tmp_path).stdout
    lines = dict(re.findall(r"^  ([\w-]+) +(.+)$", listed, flags=re.MULTILINE))
    commands = {"prepare", "distil", "train", "sample", "evaluate", "export", "inspect", "study", "demo"}
    assert commands <= lines.keys()
    assert ("report" in lines) == (ROOT / "scripts/report.py").is_file()
    assert (
        lines["distil"]
        == "Distil a student from a teacher and its dynamic batch: TCCD, or DKDM with both stages off."
    )
    assert str(installed.site / "tccd/yaml") in listed
    assert installed.tccd("--version", cwd=tmp_path).stdout == f"tccd {__version__}\n"
    for name in lines:
        usage = installed.tccd(name, "--help", cwd=tmp_path).stdout
        assert usage.startswith(f"usage: tccd {name} "), usage


def test_a_command_has_its_scripts_options(installed, tmp_path):
    for name, script in (("distil", "scripts/image_kd.py"), ("evaluate", "evaluations/evaluator.py")):
        ours = installed.tccd(name, "--help", cwd=tmp_path).stdout
        theirs = installed.finish([installed.environment / "bin/python", ROOT / script, "--help"]).stdout
        used, described = (text[text.index("\n\n") :] for text in (ours, theirs))
        assert used == described


def test_mistakes_are_told_in_one_line(installed, tmp_path):
    told = {
        ("distill",): "tccd: no command 'distill'; did you mean 'distil'?",
        (
            "distil",
            "--config",
            "cifar10_32/nothing.yaml",
        ): "no such configuration file: cifar10_32/nothing.yaml",
        ("prepare",): "the following arguments are required: --config",
    }
    for args, line in told.items():
        assert line in one_line_error(installed.tccd(*args, cwd=tmp_path, check=False))


@pytest.mark.slow
def test_a_configuration_of_the_package_runs_on_two_ranks_and_writes_here(installed, tmp_path):
    before = installed.files()
    config = ["--config", "digits_16/exp/digits-TCCD.yaml", *TINY]
    assert (
        "preparing 8 samples on 2 rank(s)" in installed.tccd("prepare", *config, cwd=tmp_path, ranks=2).stdout
    )
    done = installed.tccd("distil", *config, cwd=tmp_path, ranks=2)
    assert "2 rank(s)" in done.stdout
    assert (tmp_path / "experiments/cache/digits-TCCD.cache").is_file()
    (run,) = (tmp_path / "experiments/kd").iterdir()
    assert (run / "model000002.pt").is_file()
    record = json.loads((run / "run.json").read_text())
    assert record["command"][:2] == ["tccd distil", "--config"]
    assert record["git_revision"] == f"version {__version__}"  # not the commit of whatever lies around
    sample = ["--model_path", run / "model000002.pt", "--num_samples", 4, "--timestep_respacing", 2]
    installed.tccd("sample", *sample, cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"experiments"}
    assert installed.files() == before


@pytest.mark.slow
def test_models_of_the_package_are_sampled_from_and_scored(installed, tmp_path):
    sample = ["--model_path", "model/digits_teacher.pt", "--num_samples", 128, "--batch_size", 64]
    config = ["--config", "yaml/digits_16/teacher.yaml", "--timestep_respacing", 2, "--name", "two"]
    installed.tccd("sample", *config, *sample, cwd=tmp_path)
    installed.tccd("digits", cwd=tmp_path)
    files = ["datasets/digits/digits.npz", "experiments/sample/two/samples_128x16x16x3.npz"]
    assert "digits-FD" in installed.tccd("evaluate", *files, "--backend", "digits", cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_configuration_of_ones_own_refers_to_the_package(installed, tmp_path):
    config = {
        "base": "yaml/preset/short-run.yaml",
        "teacher": {
            "model_path": "model/digits_teacher.pt",
            "tempfile": "pool.cache",
            "model": "arch/digits-teacher.yaml",
            "diffusion": "yaml/digits_16/diffusion.yaml",
        },
        "student": {"model": "yaml/arch/digits-student.yaml"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    installed.tccd("prepare", "--config", "mine.yaml", *TINY, cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.yaml", "pool.cache"}


@pytest.mark.parametrize(
    "name", ["cifar10_32/exp/CIFAR10-14M-Baseline-0.2.yaml", "digits_16/exp/digits-TCCD.yaml"]
)
@pytest.mark.parametrize("prefix", ["", "yaml/"])
def test_configurations_are_found_by_name(name, prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(prefix + name) == ROOT / "yaml" / name
    assert load_experiment(prefix + name).name == Path(name).stem


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "digits_16/teacher.yaml"
    own.parent.mkdir()
    own.write_text("base: yaml/digits_16/teacher.yaml\nlr: 0.25\n")
    assert load_experiment("digits_16/teacher.yaml").student.training.lr == 0.25
    with pytest.raises(UserError, match=r"no such configuration file: digits_16/techer\.yaml; those that"):
        load_experiment("digits_16/techer.yaml")


@pytest.mark.slow
def test_the_quick_demo_and_the_evaluator_in_an_empty_folder(installed, tmp_path):
    """What `make test-wheel` shows."""
    before = installed.files()
    told = installed.tccd("demo", "--quick", cwd=tmp_path, threads="").stdout
    assert told.count("A quick look (--quick)") == 2
    (demo,) = (tmp_path / "experiments/demo").iterdir()
    assert (demo / "comparison.png").is_file() and "digits-FD" in (demo / "table.txt").read_text()
    files = [
        "datasets/digits/digits.npz",
        *(demo / name / "samples_100x16x16x3.npz" for name in ("teacher", "student")),
    ]
    scores = installed.tccd(
        "evaluate", *files, "--backend", "digits", "--output", "scores.json", cwd=tmp_path
    ).stdout
    assert "digits-FD" in scores and (tmp_path / "scores.json").is_file()
    assert installed.files() == before
