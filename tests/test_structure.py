"""Imports run one way, and everything depends on the contracts instead of on one network."""

import ast

import pytest
from tiny import ROOT

PACKAGE = ROOT / "guided_diffusion"
# Each may import what stands before it, and of its own line what that line's modules import of each other.
LAYERS = [
    {"errors"},
    {"io"},
    {"config"},
    {"processes"},
    {"dist_util"},
    {"logger"},
    {"kernels"},
    {"spaces", "nn", "losses"},
    {"networks", "unet"},  # unet is a module that guided-diffusion's users import: a room's beside the room
    {"gaussian_diffusion"},
    {"respace", "resample"},
    {"script_util"},
    {"image_datasets"},
    {"runs"},
    {"sampling"},
    {"training"},
    {"train_util"},
    {"distill"},
    {"setups"},
    {"studies"},
    {"reports"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """(line, full dotted name) of every import of this project's, anywhere in a file."""
    package = ("guided_diffusion", *path.relative_to(PACKAGE).parts[:-1]) if PACKAGE in path.parents else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for line, name in imported(path):
        parts = name.split(".")
        assert parts[0] not in ("evaluations", "datasets", "scripts", "tests", "benchmarks"), (
            path,
            line,
            name,
        )
        if parts[0] == "guided_diffusion" and len(parts) > 1 and own != "__init__":
            assert LEVEL[parts[1]] <= LEVEL[own], f"{path}:{line} imports {name}, which lies above it"


def test_every_room_has_its_place():
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert rooms == {
        name for name in LEVEL if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    }


@pytest.mark.parametrize("folder", ["evaluations", "datasets"])
def test_tools_do_not_import_each_other(folder):
    other = {"evaluations": "datasets", "datasets": "evaluations"}[folder]
    for path in (ROOT / folder).glob("*.py"):
        assert not [name for _, name in imported(path) if name.split(".")[0] == other], path


def test_only_the_factory_and_the_networks_know_the_unet():
    users = {path.relative_to(ROOT).as_posix() for path in FILES if "UNetModel" in path.read_text()}
    assert users == {
        "guided_diffusion/unet.py",
        "guided_diffusion/script_util.py",
        "guided_diffusion/config/registry.py",  # its name
    }
    for folder in ("scripts", "evaluations", "datasets", "benchmarks"):
        assert not [path for path in (ROOT / folder).glob("*.py") if "UNetModel" in path.read_text()]


@pytest.mark.parametrize(
    "library, users",
    [
        ("omegaconf", {"config/loading.py"}),
        ("mpi4py", {"processes/rendezvous.py"}),
        ("diffusers", {"sampling/solvers.py", "io/diffusers_library.py"}),
        ("tensorboardX", {"logger.py"}),
        ("wandb", {"logger.py"}),
        ("blobfile", {"io/remote.py"}),
        ("jinja2", {"reports/page.py"}),
    ],
)
def test_a_library_is_known_to_one_module(library, users):
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for _, name in imported(path))
    }
    assert found == users


def test_bounds_and_channels_are_the_spaces():
    """No literal -1 and 1 for clipping, and no 3 for the number of channels, outside of PixelSpace."""
    for path in FILES:
        text = path.read_text()
        assert ("clamp(-1" not in text and "127.5" not in text) or path.parent.name == "spaces", path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg in ("in_channels", "channels"):
                assert not isinstance(node.value, ast.Constant), (path, node.lineno)
