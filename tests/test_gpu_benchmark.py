"""`make gpu` on a processor with tiny networks: everything in it that needs no CUDA."""

import json
import runpy
import subprocess
import sys

import pytest
from tiny import ROOT


class Benchmark:
    """The command, run in this process, and what it left."""

    def __init__(self, out, monkeypatch, capsys):
        self.out, self.capsys = out, capsys
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        self.module = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))

    def __call__(self, *args):
        """Exit status, and the names of the parts that were run."""
        before = sys.argv
        sys.argv = ["gpu.py", "--tiny", "--out", str(self.out), *args]
        try:
            self.module["main"]()
        except SystemExit as leaving:
            code = leaving.code
        finally:
            sys.argv = before
        self.text = self.capsys.readouterr().out
        ran = [line.split()[1] for line in self.text.splitlines() if " ... " in line]
        return code, ran

    @property
    def results(self):
        return json.loads((self.out / "gpu.json").read_text())["parts"]


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    return Benchmark(tmp_path / "out", monkeypatch, capsys)


FEW = ["norm", "sampling", "rates", "fp32-shipped-4"]


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_parts_and_resuming(benchmark, few):
    all_parts = [name for name in benchmark.module["parts_of"](True) if "compile" not in name]
    parts = [name for name in all_parts if not few or name in FEW]
    chosen = ["--parts", ",".join(parts)]
    code, ran = benchmark(*chosen)
    assert (code, ran) == (0, parts), benchmark.text
    assert list(benchmark.results) == parts
    assert all("result" in record for record in benchmark.results.values())
    page = (benchmark.out / "gpu.md").read_text()
    assert page in benchmark.text and "**NO**" not in page and "Not there" not in page
    ways = [one["result"] for one in benchmark.results.values() if "mode" in one["result"]]
    # The same iterations in another arithmetic, or through the step that a GPU captures.
    assert [way["loss"] for way in ways] == pytest.approx([ways[0]["loss"]] * len(ways), rel=0.01)

    assert benchmark(*chosen) == (0, [])
    (benchmark.out / "parts/sampling.json").unlink()
    assert benchmark(*chosen) == (0, ["sampling"])


@pytest.mark.slow
def test_compiled_blocks_train_alike(benchmark):
    """Takes minutes to compile on a processor."""
    parts = ["bf16-shipped-4", "bf16-compile-4"]
    assert benchmark("--parts", ",".join(parts), "--seconds", "3000")[0] == 0, benchmark.text
    losses = [benchmark.results[name]["result"]["loss"] for name in parts]
    assert losses == pytest.approx([losses[0]] * 2, rel=0.01)


def test_a_part_that_fails_is_recorded_and_done_again(benchmark, monkeypatch):
    module = benchmark.module
    checks = module["gpu_checks"].CHECKS

    def failing(tiny):
        raise RuntimeError("no such kernel")

    def dying(tiny):
        module["os"]._exit(3)

    def hanging(tiny):
        module["time"].sleep(100)

    def found(tiny):
        return [module["gpu_checks"].row("a number", 2.0, 1.0)]

    for name, part in (("golden", failing), ("graph", dying), ("ranks", found)):
        monkeypatch.setitem(checks, name, part)
    code, ran = benchmark("--parts", "golden,graph,ranks")
    assert (code, ran) == (1, ["golden", "graph", "ranks"])
    assert benchmark.results["golden"]["error"] == "RuntimeError: no such kernel"
    assert benchmark.results["graph"]["error"] == "died with status 3"
    assert "not right: ranks\n" in benchmark.text and "time: golden, graph;" in benchmark.text
    page = (benchmark.out / "gpu.md").read_text()
    assert "**NO**" in page and "no such kernel" in page

    monkeypatch.setitem(checks, "golden", found)
    assert benchmark("--parts", "golden,ranks") == (1, ["golden"])
    record = module["do"]("golden", hanging, True, benchmark.out, 0.2)
    assert record["error"] == "stopped after 0 seconds"

    facts = json.loads((benchmark.out / "gpu.json").read_text())
    (benchmark.out / "gpu.json").write_text(json.dumps(facts | {"machine": {"device": "another"}}))
    with pytest.raises(module["UserError"], match="another machine"):
        benchmark()


def test_mistakes_are_told_in_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--parts", "goldne"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --parts: no part is called goldne")
    bare = [sys.executable, "-S", "-I", str(ROOT / "benchmarks/gpu.py")]  # a python without packages
    done = subprocess.run(bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this python lacks packages: pip install torch numpy omegaconf")
