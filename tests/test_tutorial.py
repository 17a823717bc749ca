"""docs/tutorial.ipynb, executed as a reader does, in a small form."""

import ast
import importlib
import re

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import ROOT

PATH = ROOT / "docs/tutorial.ipynb"


@pytest.mark.slow
def test_it_runs_to_the_end(tmp_path, monkeypatch):
    small = {"ITERATIONS": 4, "SAMPLES": 40, "RHO": 0.005, "FOLDER": tmp_path}
    for name, value in small.items():
        monkeypatch.setenv(f"TUTORIAL_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "160 samples of (3, 16, 16)" in text
    assert "step 4/4" in text
    assert "real digits (floor)" in text
    assert (tmp_path / "export/model_index.json").is_file()
    kept = [cell.get("outputs", ()) for cell in nbformat.read(PATH, as_version=4).cells]
    objective = re.search("objective: (.*?); pool", text)
    assert objective is not None
    assert objective[0] in "".join(output.get("text", "") for outputs in kept for output in outputs)


def test_what_it_imports_is_there():
    for cell in nbformat.read(PATH, as_version=4).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_it_is_kept_with_its_outputs():
    assert PATH.stat().st_size < 300_000
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
