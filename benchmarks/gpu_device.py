"""What a benchmark asks of the device that it runs on, in the same words for a GPU and for a processor."""

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch as th
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from guided_diffusion import dist_util

_DRIVER = Path("/proc/driver/nvidia/version")
_WARM_UPS = 4  # a captured step runs three times by itself, then it is captured


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return dist_util.dev().type == "cuda"


def describe() -> dict[str, str]:
    """The device, and the versions of what computes on it."""
    versions = {"torch": th.__version__, "python": platform.python_version()}
    if not on_gpu():
        return {"device": f"processor, {os.cpu_count()} cores", **versions}
    properties = th.cuda.get_device_properties(dist_util.dev())
    driver = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "driver": driver[1] if driver else "unknown",
        **versions,
        "CUDA": str(th.version.cuda),
        "cuDNN": str(th.backends.cudnn.version()),
    }


def use_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions may use TF32; torch's default is: convolutions alone."""
    th.backends.cuda.matmul.allow_tf32 = allowed
    th.backends.cudnn.allow_tf32 = allowed


def wait() -> None:
    """Wait for all the work that the device was given."""
    if on_gpu():
        th.cuda.synchronize()


def seconds_of(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, of so many made one after the other without waiting between them."""
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - started) / calls


def seconds_per_call(function: Callable[[], object], *, groups: int) -> float:
    """The median over groups of calls of half a second each (at least one call), after warming up."""
    for _ in range(_WARM_UPS if on_gpu() else 1):
        function()
    calls = min(200, 1 + int(0.5 / seconds_of(function, 1))) if groups > 1 else 1
    return statistics.median(seconds_of(function, calls) for _ in range(groups))


def busy(function: Callable[[], object]) -> tuple[float, int]:
    """Seconds that the device spends in a call's kernels (operations on a processor), and their number."""
    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu() else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    with profile(activities=[activity]) as profiler:
        function()
        wait()
    rows = [row for row in profiler.key_averages() if row.device_type == kind and not row.is_user_annotation]
    times = [row.self_device_time_total if on_gpu() else row.self_cpu_time_total for row in rows]
    return sum(times) / 1e6, sum(row.count for row in rows)


def peak_gb() -> float | None:
    """The most memory of the GPU that this process has held, in GB; None on a processor."""
    return th.cuda.max_memory_allocated() / 1e9 if on_gpu() else None
