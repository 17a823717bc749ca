"""C functions, compiled for the processor at hand when they are first needed, and kept for the next time."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import first_line
from ..io.files import atomic_path

_FLAGS = (
    *("-O2", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-strict-aliasing", "-fopenmp", "-fPIC", "-shared"),
)


def compiled(source: Path) -> ctypes.CDLL:
    """The functions of a C file.

    The compiler is `CC`, or cc. What it makes lies in the user's cache (`XDG_CACHE_HOME`, or ~/.cache), named
    by the content of the file and the processor; where nothing can be written it is made anew each time.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        RuntimeError: it cannot compile this, or the user has no home.
    """
    compiler = shlex.split(os.environ.get("CC") or "cc")
    named_by = (source.read_bytes(), compiler, _FLAGS, _processor())
    name = f"{source.stem}-{hashlib.sha256(repr(named_by).encode()).hexdigest()[:16]}.so"
    library = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tccd" / name
    with suppress(OSError):  # it is not there, or damaged
        return ctypes.CDLL(str(library))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, name)
        command = [*compiler, *_FLAGS, "-o", str(made), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(first_line(RuntimeError(done.stderr or f"{compiler[0]} failed")))
        with suppress(OSError), atomic_path(library) as temporary:
            shutil.copyfile(made, temporary)
        return ctypes.CDLL(str(made))


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features", "isa")):  # x86, Arm, RISC-V
                return line
    return f"{platform.machine()} {platform.processor()}"
