"""C functions, compiled for the processor at hand when they are first needed, and kept for the next time."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import first_line
from ..io.files import atomic_path
from ..io.shipped import user_cache

_FLAGS = (
    *("-O2", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-fopenmp", "-fPIC", "-shared"),
    *(["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []),
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
    named_by = repr((source.read_bytes(), compiler, _FLAGS, _processor())).encode()
    library = user_cache() / "tccd" / f"{source.stem}-{hashlib.sha256(named_by).hexdigest()[:16]}.so"
    if not _is_whole(library):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, library.name)
            command = [*compiler, *_FLAGS, "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not made.exists():
                raise RuntimeError(first_line(RuntimeError(done.stderr or f"{compiler[0]} made nothing")))
            content = made.read_bytes()
            with suppress(OSError), atomic_path(library) as temporary:
                temporary.write_bytes(content + hashlib.sha256(content).digest())
            if not _is_whole(library):
                return ctypes.CDLL(str(made))
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Whether it ends in the digest of what stands before: loading a damaged one would end the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features", "isa")):  # x86, Arm, RISC-V
                return line
    return f"{platform.machine()} {platform.processor()}"
