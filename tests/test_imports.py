"""Imports run one way, wherever in a module they stand."""

import ast
from pathlib import Path

import pytest
from tiny import ROOT

PACKAGE = ROOT / "guided_diffusion"
# Each may import those before it; what is not named may import all.
LAYERS = ["errors", "io", "config", "processes", "dist_util"]
MODULES = [path for name in LAYERS for path in [*PACKAGE.glob(f"{name}.py"), *PACKAGE.glob(f"{name}/*.py")]]


def imported(path):
    """The modules of the package that a file imports, each as its path within the package."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) + 1 - node.level]
            names = node.module.split(".") if node.module else []
            yield from ([*above, *names, alias.name] for alias in node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            yield from (name.split(".")[1:] for name in names if name.startswith("guided_diffusion."))


def layer(name):
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = layer(Path(path.relative_to(PACKAGE).parts[0]).stem)
    for parts in imported(path):
        assert layer(parts[0]) <= own, f"imports {'.'.join(parts)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_reached_without_an_import(path):
    """Only mpi4py, which is there or not, may be looked for among the modules that are loaded."""
    found = {line.strip() for line in path.read_text().splitlines() if "sys.modules" in line}
    assert all("mpi4py" in line for line in found), found
