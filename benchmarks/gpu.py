"""Is it right on this GPU, and how fast: `make gpu`. One command, no network, at most nine minutes at a time.

Each part runs in a process of its own, which a fault of the device or a lack of memory takes down alone, and
leaves OUT/parts/NAME.json, with what it found or its error. The same command does what is not there yet, and
what failed, until all is there. At the end, and whenever it stops, it writes OUT/gpu.json, all of it, and
OUT/gpu.md, a section for docs/performance.md, which it prints too.

It needs a checkout, not an installation.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = {
    **{name: name for name in ("torch", "numpy", "omegaconf", "safetensors", "tqdm")},
    **{"PIL": "pillow", "scipy": "scipy", "matplotlib": "matplotlib", "tensorboardX": "tensorboardX"},
}
if missing := [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
    sys.exit(f"error: this python lacks packages: pip install {' '.join(missing)}")
sys.path[:0] = [str(ROOT / folder) for folder in ("", "benchmarks", "tests", "tests/faults")]
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not begin to use it
os.environ["OMP_NUM_THREADS"] = "1"  # a process that has computed on several cannot fork one that computes
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
)  # the scripts'

import gpu_checks  # noqa: E402
import gpu_device  # noqa: E402
import gpu_report  # noqa: E402
import gpu_speed  # noqa: E402

from guided_diffusion import dist_util  # noqa: E402
from guided_diffusion.config import command_line  # noqa: E402
from guided_diffusion.errors import UserError  # noqa: E402
from guided_diffusion.io.files import write_text  # noqa: E402
from guided_diffusion.runs.provenance import git_revision  # noqa: E402

Part = Callable[[bool], Any]
# A child starts at once, with everything imported. It works because this process never asks for the GPU.
_FORK = multiprocessing.get_context("fork")


def parts_of(tiny: bool) -> dict[str, Part]:
    """All parts by name, in the order in which they are run."""
    return {**gpu_checks.CHECKS, **gpu_speed.speeds(tiny)}


def machine(tiny: bool) -> dict[str, str]:
    """What the results are of."""
    dist_util.setup_dist()
    return gpu_device.describe()


def write(path: Path, contents: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(contents, indent=1))


def work(name: str, part: Part, tiny: bool, out: Path) -> None:
    """In a child: do one part and leave its file."""
    os.setpgid(0, 0)  # so that what it starts ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(out / "parts" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.monotonic()
    try:
        record: dict[str, Any] = {"result": part(tiny)}
    except BaseException as error:
        traceback.print_exc()
        record = {"error": f"{type(error).__name__}: {error}"[:1000]}
    record |= {"took": round(time.monotonic() - started, 1), "revision": git_revision()}
    write(out / "parts" / f"{name}.json", record)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def do(name: str, part: Part, tiny: bool, out: Path, seconds: float) -> dict[str, Any]:
    """Have a child do one part; the record it left. One that dies or takes longer leaves an error."""
    path = out / "parts" / f"{name}.json"
    path.unlink(missing_ok=True)
    child = _FORK.Process(target=work, args=(name, part, tiny, out))
    child.start()
    try:
        child.join(seconds)
        late = child.is_alive()
    finally:
        if child.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.join()
    if not path.is_file():
        error = f"stopped after {seconds:.0f} seconds" if late else f"died with status {child.exitcode}"
        write(path, {"error": error, "took": round(seconds, 1)})
    return json.loads(path.read_text())


def main() -> None:
    """Do the parts that are not there yet, and report."""
    parser = command_line.make_bare_parser(__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "experiments/gpu", help="folder (default experiments/gpu)"
    )
    parser.add_argument("--parts", help="only these, such as golden,resume (default: all)")
    parser.add_argument(
        "--seconds", type=command_line.positive, default=520, help="begin no part after these (default 520)"
    )
    parser.add_argument("--tiny", action="store_true", help="on a processor, with tiny networks, to try it")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    parts = parts_of(args.tiny)
    chosen = args.parts.split(",") if args.parts else list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        raise UserError(f"--parts: no part is called {', '.join(unknown)}; there are {', '.join(parts)}")
    if args.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out = args.out.resolve()
    (out / "parts").mkdir(parents=True, exist_ok=True)

    found = do("machine", machine, args.tiny, out, 120)
    if "error" in found:
        raise UserError(f"the device cannot be used: {found['error']}")
    if found["result"]["device"].startswith("processor") and not args.tiny:
        raise UserError("torch finds no CUDA device here; --tiny tries the same on a processor")
    command = "python benchmarks/gpu.py" + (" --tiny" if args.tiny else "")
    facts = found["result"] | {"command": command}
    whole: dict[str, Any] = {"machine": facts, "parts": {}}
    earlier = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").is_file() else whole
    if earlier["machine"] != facts:
        raise UserError(f"{out}: holds results of another machine: choose another --out")

    for number, name in enumerate(parts, 1):
        path = out / "parts" / f"{name}.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        left = deadline - time.monotonic()
        if name in chosen and "result" not in record and left > 0:
            print(f"{number}/{len(parts)} {name} ...", end=" ", flush=True)
            record = do(name, parts[name], args.tiny, out, left + 20)
            print(record.get("error", "done"), f"({record['took']} s)", flush=True)
        if record:
            whole["parts"][name] = record
        write(out / "gpu.json", whole)
    section = gpu_report.section(whole)
    write_text(out / "gpu.md", section)
    print(f"\n{section}\nwrote {out}/gpu.json and gpu.md")
    if wrong := gpu_report.wrong(whole):
        print(f"not right: {', '.join(wrong)}")
    if undone := [name for name in chosen if "result" not in whole["parts"].get(name, {})]:
        print(f"failed, or left for want of time: {', '.join(undone)}; the same command goes on")
    sys.exit(1 if wrong or undone else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    try:
        main()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
