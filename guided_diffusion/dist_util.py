"""Processes and devices: with `rendezvous` the only module that knows MPI and torch.distributed.

Works alike under mpiexec, torchrun, srun and as one plain process. On one process every collective is
the identity and torch.distributed is not started.
"""

import atexit
import ctypes
import gc
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch as th
import torch.distributed as dist
import torch.distributed.nn  # imported later, as by torch.optim, it would hold the group for ever

from .errors import UserError, message_of
from .io import files, progress
from .io.remote import fetch, is_url
from .processes.cores import since_start, usable_cores
from .processes.launch import Launch, detect_launch
from .processes.rendezvous import TIMEOUT, introduce, meet
from .processes.stopping import ranks_have_met

_T = TypeVar("_T")
_NAMES_FILES = ("_path", "_checkpoint", "_reference", "tempfile")  # how settings end that do
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass
class _State:
    """What this rank knows of itself and the others; `cores` is its share of its host's."""

    device: th.device
    launch: Launch
    cores: int
    store: dist.Store | None = None
    cpu_group: dist.ProcessGroup | None = None
    turn: int = 0  # of `_wait_for_rank_zero`


_state = _State(th.device("cpu"), Launch("none", 0, 1, 0), usable_cores())


def setup_dist() -> Launch:
    """Meet the other ranks and choose this rank's device; safe to call twice.

    Raises:
        UserError: launched by MPI without mpi4py, or started with more ranks per host than torchrun
            or SLURM describe.
    """
    if dist.is_initialized():
        return _state.launch
    launch = detect_launch()
    _state.launch = launch
    if launch.world_size == 1:
        _state.device = _choose_device(0)
        use_threads(round(since_start.free_cores()))
        return launch
    store, local_rank = meet(launch)
    _state.store = store
    ranks_have_met()
    _state.device = _choose_device(local_rank)
    ranks = introduce(store, launch, (socket.gethostname(), _gpu()))
    # Ranks share the host's cores; without this each would start a thread on every one.
    ranks_here = sum(host == socket.gethostname() for host, _ in ranks)
    _state.cores = min(usable_cores(), (os.cpu_count() or 1) // ranks_here)
    use_threads(_state.cores)
    gpus = {gpu for _, gpu in ranks if gpu is not None}
    dist.init_process_group(
        "nccl" if len(gpus) == len(ranks) else "gloo",  # nccl refuses two ranks on one GPU
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=TIMEOUT,
    )
    atexit.register(_leave)
    return launch


def _choose_device(local_rank: int) -> th.device:
    if not th.cuda.is_available():
        _keep_freed_memory()
        return th.device("cpu")
    device = th.device("cuda", local_rank % th.cuda.device_count())
    th.cuda.set_device(device)
    return device


def _gpu() -> str | None:
    """The name of this rank's GPU in the whole world, whatever number it has here; None without one."""
    device = dev()
    return str(th.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def use_threads(count: int) -> None:
    """Compute with so many threads on a CPU, or as many as this rank has cores, if it has fewer; unless
    OMP_NUM_THREADS says how many.

    What they sum up in another order differs in the last digits, so a run that is continued keeps its number.
    """
    if dev().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(max(1, min(count, _state.cores)))


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: given back, the kernel clears it anew for every large tensor.

    On the CPU small networks train 1.3 times as fast, and peak memory is the same: docs/performance.md.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems' C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _leave() -> None:
    """End gloo's threads while Python is alive: one that lets go of a tensor later aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _state.cpu_group = None  # whose threads end with the last reference to it


def dev() -> th.device:
    """This rank's device."""
    return _state.device


def rank() -> int:
    """This process's number among all, from 0."""
    return _state.launch.rank


def world_size() -> int:
    """Number of processes."""
    return _state.launch.world_size


def describe() -> list[str]:
    """One line per rank: rank, host, device. Collective."""
    device = dev()
    name = th.cuda.get_device_name(device) if device.type == "cuda" else f"{th.get_num_threads()} threads"
    line = f"rank {rank()}: host {socket.gethostname()}, {device} ({name})"
    return all_gather_object(line)


def peak_memory() -> str:
    """The most memory that this rank has held, on the host and on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    told = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    if dev().type == "cuda":
        told += f" and {th.cuda.max_memory_allocated(dev()) / 1e9:.2f} GB of the GPU"
    return told


def free_device_memory() -> None:
    """Give what nothing uses of this rank's GPU to other processes; networks with graphs are cycles."""
    if dev().type == "cuda":
        gc.collect()
        th.cuda.empty_cache()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_gather(tensor: th.Tensor) -> th.Tensor:
    """Concatenate every rank's tensor (same shape on all) along the first dimension, in rank order."""
    if not dist.is_initialized():
        return tensor
    parts = [th.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous(), group=_cpu_group() if tensor.device.type == "cpu" else None)
    return th.cat(parts)


def gather(tensor: th.Tensor) -> th.Tensor:
    """A copy on rank 0's CPU of every rank's tensor (same shape on all), joined along the first dimension in
    rank order; on the other ranks no rows. Collective.
    """
    own = tensor.detach().to("cpu", copy=True)
    if not dist.is_initialized():
        return own
    if rank() != 0:
        dist.gather(own, group=_cpu_group())
        return own[:0]
    joined = own.new_empty(world_size() * len(own), *own.shape[1:])
    dist.gather(own, list(joined.chunk(world_size())), group=_cpu_group())
    return joined


def all_reduce_sum(tensor: th.Tensor) -> th.Tensor:
    """The sum of every rank's tensor."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; on the CPU, so a GPU is not waited for."""
    if not dist.is_initialized():
        return flag
    answer = th.tensor([float(flag)])
    dist.all_reduce(answer, group=_cpu_group())
    return bool(answer.item())


def _cpu_group() -> dist.ProcessGroup:
    """All ranks, for tensors on the CPU, which nccl does not take. Collective at its first call."""
    if _state.cpu_group is None:
        _state.cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _state.cpu_group


class _GatherWithGrad(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: th.Tensor) -> th.Tensor:
        ctx.rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> th.Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_with_grad(tensor: th.Tensor) -> th.Tensor:
    """`all_gather` through which gradients flow back to the rank each row came from."""
    return _GatherWithGrad.apply(tensor) if dist.is_initialized() else tensor


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's (small, picklable) value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_same(settings: Mapping[str, Any]) -> None:
    """Refuse to go on if a rank was started with other settings than rank 0. Collective.

    Files may have other names on other hosts, so settings that name one (those of `_NAMES_FILES`) may differ.

    Args:
        settings: by the name that the user knows.

    Raises:
        UserError: on all ranks, with the first rank and setting that differ.
    """
    told = {key: value for key, value in settings.items() if not key.endswith(_NAMES_FILES)}
    first, *others = all_gather_object(told)
    for number, other in enumerate(others, 1):
        for key in {**first, **other}:
            if first.get(key) != other.get(key):
                raise UserError(
                    f"{key} is {first.get(key)} on rank 0 and {other.get(key)} on rank {number}: start all "
                    "ranks with the same configuration and flags"
                )


def broadcast_object(value: Any) -> Any:
    """Rank 0's (small, picklable) value, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _wait_for_rank_zero() -> None:
    """Wait for what rank 0 does alone, maybe for hours; a collective gives up after `TIMEOUT`. Collective.

    If rank 0 dies, so does the store that it is asked through, or the launcher ends this rank.
    """
    if not dist.is_initialized():
        return
    _state.turn += 1
    name, store, pause = f"turn{_state.turn}", _state.store, 0.001
    assert store is not None
    if rank() == 0:
        store.set(name, "")
    while not store.check([name]):
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def from_rank_zero(function: Callable[[], _T]) -> _T:
    """What a function returns on rank 0 (small, picklable), on all ranks. Collective.

    Raises:
        UserError: it raised one there, or an OSError.
    """
    answer: Any = None
    if rank() == 0:
        try:
            answer = function(), ""
        except (UserError, OSError) as error:
            answer = None, message_of(error)
    _wait_for_rank_zero()
    result, mistake = broadcast_object(answer)
    if mistake:
        raise UserError(mistake)
    return result


def say(line: str) -> None:
    """`io.progress.say`, by rank 0 alone."""
    if rank() == 0:
        progress.say(line)


def warn(message: str) -> None:
    """`io.progress.warn`, by rank 0 alone."""
    if rank() == 0:
        progress.warn(message)


def local_copy(name: str, cache: Path) -> Path:
    """The path of an input file; one at a URL is first copied to `cache` by rank 0. Collective.

    Raises:
        UserError: there is none at the URL, or it cannot be read.
    """
    return from_rank_zero(lambda: fetch(name, cache)) if is_url(name) else Path(name)


@th.no_grad()
def sync_params(tensors: Iterable[th.Tensor]) -> None:
    """Overwrite every rank's tensors with rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@th.no_grad()
def average_gradients(parameters: Iterable[th.nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the ranks, in one collective.

    A parameter without a gradient counts as zero, so that ranks need not agree on which have one.
    """
    if not dist.is_initialized():
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = th.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = th.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    chunks = flat.split([gradient.numel() for gradient in gradients])
    th._foreach_copy_(gradients, [c.view_as(g) for c, g in zip(chunks, gradients, strict=True)])


@contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Let rank 0 through (True), then the others (False) once it is done.

    If rank 0 fails the others fail too instead of waiting.
    """
    if rank() == 0:
        ok = False
        try:
            yield True
            ok = True
        finally:
            _wait_for_rank_zero()
            broadcast_object(ok)
    else:
        _wait_for_rank_zero()
        if not broadcast_object(None):
            raise UserError("rank 0 failed")
        yield False


@contextmanager
def held_by_rank_zero(path: Path) -> Iterator[None]:
    """Rank 0 keeps other jobs from writing to a directory or file (`files.held`) until the block ends."""
    with ExitStack() as lock:
        with rank_zero_first() as first:
            if first:
                lock.enter_context(files.held(path))
        yield
