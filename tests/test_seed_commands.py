"""Every command of the published README, in miniature: its own configurations with smaller sizes.

One chain per data set, in the README's order: prepare, distil, sample a synthetic set, train on it, mix
it with real images, train on those, sample from the result, evaluate. CIFAR-10 by `mpiexec -n 1`,
CelebA (64x64) by `mpiexec -n 2` where the README has more than one process, ImageNet32 without mpiexec.
"""

import csv
import re

import numpy as np
import pytest
import torch as th
from golden_data import unpack_golden_graph
from in_process import script_here
from PIL import Image
from tiny import ROOT, T, make_teacher, script

from guided_diffusion.config.loading import load_experiment
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.image_datasets import open_dataset
from guided_diffusion.runs.checkpoint import newest_checkpoint

SMALL = [
    *("num_channels=32", "num_res_blocks=1", "channel_mult=1,2", "num_head_channels=32"),
    *(f"diffusion_steps={T}", "attention_resolutions=16"),
]
TRAINING = ["batch_size=4", "save_interval=2", "ema_rate=0.5"]
RUN = ["run.iterations=2", "run.sample_interval=-1"]
REAL, SYNTHETIC = 10, 16  # images


class Miniature:
    """A data set's files and commands, all in one folder.

    Args:
        name: the data set's folder under yaml/.
        student: the start of its experiments' names.
        teacher: its teacher's file.
        builder: the script that writes its reference.
        folder: where everything lies.
        ranks: processes where the README has several; 0 runs all scripts in this process.
    """

    def __init__(self, name, student, teacher, builder, folder, ranks):
        self.folder, self.ranks, self.builder = folder, ranks, builder
        self.yaml, self.student = ROOT / "yaml" / name, student
        self.image_size = int(name.rpartition("_")[2])
        self.weights = folder / teacher
        make_teacher(load_experiment(self.yaml / "teacher.yaml", SMALL).student, self.weights)

    def run(self, name, *args, ranks=None):
        """Run a script with as many ranks as the README has (1), or this data set's many."""
        many = self.ranks if ranks is None else min(ranks, self.ranks)
        return script_here(name, *args) if many == 0 else script(name, *args, ranks=many, cwd=self.folder)

    def distillation(self, kind):
        """Configuration and overrides of an experiment such as "TCCD-0.4"."""
        small = [f"{section}.{key}" for section in ("teacher", "student") for key in SMALL]
        training = [f"student.{key}" for key in TRAINING]
        pool = f"teacher.tempfile={self.folder / 'pool.cache'}"
        config = self.yaml / f"exp/{self.student}-{kind}.yaml"
        small.append("teacher.BATCH=0.1")
        return ["--config", config, *small, *training, *RUN, f"teacher.model_path={self.weights}", pool]

    def sample(self, weights, config, name, respacing, count, ranks=None):
        """The README's sampling command; the npz it wrote."""
        flags = ["--batch_size", 5, "--num_samples", count, "--timestep_respacing", respacing]
        self.run(
            "scripts/image_sample.py", *config, "--model_path", weights, *flags, "--use_ddim", "False",
            "--log_dir", self.folder / name, ranks=ranks,
        )  # fmt: skip
        path = self.folder / name / f"samples_{count}x{self.image_size}x{self.image_size}x3.npz"
        with np.load(path) as archive:
            images = archive["arr_0"]
        assert images.shape == (count, self.image_size, self.image_size, 3) and images.dtype == np.uint8
        assert len(np.unique(images.reshape(count, -1), axis=0)) == count
        return path

    def train(self, config, data, name):
        """The README's training command; the averaged weights it ended with."""
        run = self.folder / name
        self.run(
            "scripts/image_train.py", "--data_dir", data, "--config", self.yaml / f"exp/{config}.yaml",
            *SMALL, *TRAINING, *RUN, "--exp_dir", run,
        )  # fmt: skip
        assert_a_run_of_two_iterations(run)
        return run / "ema_0.5_000002.pt"

    def reference(self):
        """Real images, from a folder, by this data set's builder."""
        rng = np.random.default_rng(0)
        (self.folder / "real").mkdir()
        width, height = (178, 218) if self.image_size == 64 else (32, 32)
        for number in range(REAL):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.folder / f"real/{number:06}.png")
        path = self.folder / "reference.npz"
        script_here(f"evaluations/{self.builder}.py", "--in", self.folder / "real", "--out", path)
        return path


def assert_a_run_of_two_iterations(run):
    assert newest_checkpoint(run).step == 2
    weights = th.load(run / "model000002.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())
    with open(run / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2"] and float(rows[0]["skipped"]) == 0


@pytest.mark.parametrize(
    "name, student, teacher, builder, ranks",
    [
        pytest.param(
            *("cifar10_32", "CIFAR10-14M", "32x32_diffusion_cifar10.pt", "cifar_npz", 1),
            marks=pytest.mark.slow,
        ),
        ("celeba_64", "CelebA64-57M", "DDPM_IP_celeba64.pt", "celeba64_npz", 2),
        ("imagenet_32", "ImageNet32-14M", "DDPM_IP_imageNet32.pt", "imagenet32_npz", 0),
    ],
)
def test_every_command(name, student, teacher, builder, ranks, tmp_path):
    mini = Miniature(name, student, teacher, builder, tmp_path, ranks)
    distillation = mini.distillation("TCCD-0.4")

    # TCCD: preparation (one process in the README), training.
    mini.run("scripts/dynamic_prepare.py", *distillation, ranks=1)
    assert (
        len(read_pool(tmp_path / "pool.cache", T, (3, mini.image_size, mini.image_size)))
        == round(0.1 * T) * 4
    )
    done = mini.run("scripts/image_kd.py", *distillation, "--exp_dir", tmp_path / "kd")
    assert f"{ranks or 1} rank(s)" in done.stdout and "objective: TCCD" in done.stdout
    assert_a_run_of_two_iterations(tmp_path / "kd")

    # Data-free training: a synthetic set of the teacher's, and the baseline on its folder.
    teachers = ["--config", mini.yaml / "teacher.yaml", *SMALL]
    synthetic = mini.sample(mini.weights, teachers, "synthetic", T if name == "cifar10_32" else 5, SYNTHETIC)
    baseline = mini.train(f"{student}-Baseline", synthetic.parent, "data-free")

    # Data-limited training: 20 % real images, the rest synthetic; data-based would be ratio 1.
    reference, mixed = mini.reference(), tmp_path / "mixed.npz"
    sources = ["--real", reference, "--synthetic", synthetic]
    script_here("datasets/mix.py", *sources, "--ratio", 0.2, "--seed", 0, "--out", mixed)
    real = {image.tobytes() for image in np.load(reference)["arr_0"]}
    assert sum(image.tobytes() in real for image in np.load(mixed)["arr_0"]) == round(0.2 * REAL)
    mini.ranks = 0  # training and sampling with these ranks has been shown
    mini.train(f"{student}-Baseline-0.2", mixed, "data-limited")

    # Sampling from what was trained: one process, 50 steps in the README.
    samples = mini.sample(tmp_path / "kd/ema_0.5_000002.pt", distillation, "student", 4, 4)
    config = ["--config", mini.yaml / f"exp/{student}-Baseline.yaml", *SMALL]
    others = mini.sample(baseline, config, "baseline", 4, 4)
    assert not np.array_equal(np.load(samples)["arr_0"], np.load(others)["arr_0"])


def test_the_dynamic_iterative_distillation_baseline(tmp_path):
    """DKDM by the -Dynamic-0.4 configurations: the pool is TCCD's, both stages are off."""
    mini = Miniature("cifar10_32", "CIFAR10-14M", "32x32_diffusion_cifar10.pt", "cifar_npz", tmp_path, 0)
    mini.run("scripts/dynamic_prepare.py", *mini.distillation("TCCD-0.4"))
    done = mini.run("scripts/image_kd.py", *mini.distillation("Dynamic-0.4"), "--exp_dir", tmp_path / "kd")
    assert "objective: DKDM" in done.stdout
    assert_a_run_of_two_iterations(tmp_path / "kd")


@pytest.mark.filterwarnings("ignore:.*images are fewer than:UserWarning")
def test_evaluating_samples_against_a_builders_reference(tmp_path):
    mini = Miniature("cifar10_32", "CIFAR10-14M", "32x32_diffusion_cifar10.pt", "cifar_npz", tmp_path, 0)
    reference = mini.reference()
    teachers = ["--config", mini.yaml / "teacher.yaml", *SMALL]
    samples = mini.sample(mini.weights, teachers, "samples", 2, 8)
    graph = unpack_golden_graph(tmp_path / "inception.pb")
    done = script_here("evaluations/evaluator.py", reference, samples, "--inception", graph)
    scores = dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)
    for score in ("Inception Score", "FID", "sFID", "Precision", "Recall"):
        assert np.isfinite(float(scores[score].split()[0])), score
    assert float(scores["FID"].split()[0]) > 0


def test_data_based_training_sees_real_images_alone(tmp_path):
    mini = Miniature("celeba_64", "CelebA64-57M", "DDPM_IP_celeba64.pt", "celeba64_npz", tmp_path, 0)
    reference, out = mini.reference(), tmp_path / "mixed"
    script_here("datasets/mix.py", "--real", reference, "--ratio", 1, "--out", out)
    dataset = open_dataset(out, 64, class_cond=False)
    images, _ = dataset.batch(np.arange(REAL))
    assert len(dataset) == REAL
    assert {image.tobytes() for image in images} == {image.tobytes() for image in np.load(reference)["arr_0"]}
    mini.train("CelebA64-57M-Baseline-1", out, "data-based")


def test_the_page_names_tests_and_configurations_that_exist():
    page = (ROOT / "docs/commands.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (file, name)
    configurations = set()
    for name in re.findall(
        r"`((?:CIFAR10|CelebA64|CelebAHQ256|FFHQ256|ImageNet32|digits|digits32)-[^`]+)`", page
    ):
        before, some, after = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", name).groups()
        configurations |= {f"{before}{one}{after}" for one in (some or "").split(",")}
    assert configurations == {path.stem for path in ROOT.glob("yaml/*/exp/*.yaml")}
