"""The study of real data in miniature, from the download to the table, as docs/reproduce.md has it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import yaml
from golden_data import GOLDEN, unpack_golden_graph
from test_data_tools import call, cifar_npz, download, fake_torchvision, rows_of, write_archive
from tiny import ROOT

from evaluations.inception_tensorflow import URL
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.io.npz_reader import NpzFile
from guided_diffusion.script_util import build_network

SHIPPED = ROOT / "yaml/study/cifar10.yaml"
RUNS = ["DKDM", "teacher", "TCCD", "tccd-plus", "data-free"]
SMALL = [
    "timestep_respacing=20",
    "num_channels=8",
    "num_res_blocks=1",
    "channel_mult='1,2'",
    "num_head_channels=8",
]


def fake_archive(path):
    """An archive like the official one, of the golden images."""
    images = NpzFile(GOLDEN / "g6_images_ref.npz").load("arr_0")
    parts = {f"data_batch_{i}": images[20 * i : 20 * i + 20] for i in range(1, 6)}
    parts["test_batch"] = images[:10]
    files = {
        name: {"data": rows_of(part), "labels": [k % 10 for k in range(len(part))]}
        for name, part in parts.items()
    }
    return write_archive(path, files)


class FakeCifar:
    """In place of torchvision's class, which downloads the archive."""

    filename = "cifar-10-python.tar.gz"

    def __init__(self, root, download):
        fake_archive(f"{root}/{self.filename}")


def miniature(folder):
    """The shipped study with networks, process, sizes and places that a test can have; return its path."""
    content = yaml.safe_load(SHIPPED.read_text())
    config = (ROOT / content["config"]).resolve()
    own = [f"{part}.{key}" for part in ("teacher", "student") for key in SMALL]
    own += [f"teacher.model_path={folder}/teacher.pt", f"teacher.tempfile={folder}/pool.cache"]
    own += ["teacher.batch_size=16", "student.batch_size=4", "student.ema_rate=0.9", "run.precision=fp32"]
    own += [f"distill.{key}={value}" for key, value in content["overrides"]["distill"].items()]
    content |= {"config": str(config), "overrides": own, "reference": f"{folder}/cifar10_train.npz"}
    content |= {"budgets": {"published": {"iterations": 4}}, "score_at": [1]}
    content["runs"] = {name: content["runs"][name] for name in RUNS}
    presets = content["runs"]["tccd-plus"]
    presets["presets"] = str(ROOT / presets["presets"])
    content["metrics"] |= {"samples": 12, "respacing": 5, "batch_size": 12, "held_out": 4, "chains": 2}
    path = folder / "cifar10.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path, load_distillation(config, own)


@pytest.mark.slow
def test_from_the_download_to_the_table(monkeypatch, tmp_path):
    fake_torchvision(monkeypatch, FakeCifar)
    call(monkeypatch, download, "--out", tmp_path)
    call(monkeypatch, cifar_npz, "--in", tmp_path / "cifar_train", "--out", tmp_path / "cifar10_train.npz")

    # Where the evaluator asks for the graph to be put on machines without a network.
    cache = tmp_path / "cache/guided-diffusion-tccd"
    cache.mkdir(parents=True)
    unpack_golden_graph(cache / URL.rsplit("/", 1)[1])

    path, experiment = miniature(tmp_path)
    tiny.make_teacher(experiment.teacher, tmp_path / "teacher.pt")
    student, _ = build_network(experiment.student, "student.")
    assert sum(p.numel() for p in student.parameters()) < 1e5

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, str(ROOT / "scripts/study.py"), str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [record["run"] for record in records] == RUNS
    for record in records:
        (score,) = record["scores"]
        assert score["primary"] == score["fid"] > 0 and np.isfinite(score["fid"])
        assert {"sfid", "precision", "recall"} < score.keys()
    report = (tmp_path / "out/report.md").read_text()
    assert "| TCCD |" in report and "FID" in report
