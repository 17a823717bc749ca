"""The console command: `tccd distil OPTIONS` is `python scripts/image_kd.py OPTIONS`, and so on.

In a wheel this package also holds the folders scripts/, datasets/, yaml/ and model/ of a checkout.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from guided_diffusion import __version__
from guided_diffusion.errors import UserError, suggestion
from guided_diffusion.io.shipped import LIBRARY, SHIPPED
from guided_diffusion.processes.launch import run_script

_FILES = {
    "demo": "scripts/demo.py",
    "prepare": "scripts/dynamic_prepare.py",
    "distil": "scripts/image_kd.py",
    "train": "scripts/image_train.py",
    "sample": "scripts/image_sample.py",
    "evaluate": "evaluations/evaluator.py",
    "report": "scripts/report.py",
    "study": "scripts/study.py",
    "inspect": "scripts/inspect_checkpoint.py",
    "export": "scripts/export_diffusers.py",
    "digits": "datasets/digits.py",
    "download-cifar10": "datasets/download_cifar10.py",
    "mix": "datasets/mix.py",
    "cifar-npz": "evaluations/cifar_npz.py",
    "celeba64-npz": "evaluations/celeba64_npz.py",
    "imagenet32-npz": "evaluations/imagenet32_npz.py",
}
_PLACES = {"evaluations": LIBRARY}
COMMANDS = {
    name: path
    for name, file in _FILES.items()
    if (path := _PLACES.get(file.partition("/")[0], SHIPPED) / file).is_file()
}


def main() -> None:
    """Run the script that the first argument names with all others."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"tccd {__version__}")
    else:
        run_script(lambda: _run(name))


def overview() -> str:
    """What `tccd --help` prints: every command with the first line of its script's docstring."""
    lines = ["usage: tccd COMMAND [options]", "       mpiexec -n N tccd COMMAND [options]", ""]
    for name, path in COMMANDS.items():
        lines.append(f"  {name:18}{_first_line(path)}")
    return "\n".join(
        [
            *lines,
            "",
            "tccd COMMAND --help lists its options; tccd --version is the version.",
            f"Configurations and studies: {SHIPPED / 'yaml'}",
            "Paths below that folder are found from anywhere, such as",
            "--config cifar10_32/exp/CIFAR10-14M-TCCD-0.4.yaml",
        ]
    )


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _run(name: str) -> None:
    """Run a command as `python SCRIPT` would.

    Raises:
        UserError: there is no such command; or whatever the script raises.
    """
    if name not in COMMANDS:
        raise UserError(f"tccd: no command '{name}'; {suggestion(name, COMMANDS)}")
    sys.argv = [f"tccd {name}", *sys.argv[2:]]
    _load(COMMANDS[name]).main()


def _load(path: Path) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"tccd_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
