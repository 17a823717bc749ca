"""All kernels of a function in one CUDA graph.

A GPU does what a small network asks for in less time than Python takes to ask for it, kernel by kernel. A
graph asks for all of it at once.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch as th

_WARM_UPS = 3  # calls that fill caches, lazily made states and the allocator, as torch asks for
_MOST = 2  # recordings of a function
_WAITED = "called a synchronizing CUDA operation"  # as torch warns of it
_PROTOTYPE = "Synchronization debug mode is a prototype"  # as it says of warning of that


@dataclasses.dataclass(frozen=True)
class _Recording:
    """A graph, where it reads its arguments, and what it gives."""

    graph: th.cuda.CUDAGraph
    arguments: list[th.Tensor]
    result: Any


class Captured:
    """A function whose kernels are recorded at its fourth call on a GPU, and launched at once from then on.

    It must do the same at every call but for what tensors hold: its arguments, and others that keep their
    place in memory, torch's random numbers included. Each of the first two sets of argument shapes has its
    own graph; with further shapes it is called as before, and so is a function that waits for the device,
    which no graph can do.

    Args:
        function: takes and returns tensors, None and other values, and dataclasses, dictionaries, tuples and
            lists of them.

    Attributes:
        waits: whether the function turned out to wait for the device.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.waits = False
        self._calls: Counter[str] = Counter()
        self._recordings: dict[str, _Recording] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; its tensors are the caller's own."""
        tensors: list[th.Tensor] = []

        def noted(tensor: th.Tensor) -> str:
            tensors.append(tensor)
            return f"{tensor.dtype} {list(tensor.shape)}"

        key = repr(_changed((args, kwargs), noted))
        if self.waits or not tensors or not all(tensor.is_cuda for tensor in tensors):
            return self.function(*args, **kwargs)
        if key not in self._recordings:
            if len(self._recordings) == _MOST:
                return self.function(*args, **kwargs)
            self._calls[key] += 1
            if self._calls[key] <= _WARM_UPS:
                return self._warm_up(self._calls[key] == _WARM_UPS, args, kwargs)
            self._recordings[key] = self._record(args, kwargs)
        recording = self._recordings[key]
        th._foreach_copy_(recording.arguments, tensors)
        recording.graph.replay()
        return _copied(recording.result)

    @property
    def recorded(self) -> bool:
        """Whether calls are launched at once by now."""
        return bool(self._recordings)

    def _warm_up(self, last: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call it on a stream of its own, as torch asks for; the last time note whether it waits."""
        stream, present = th.cuda.Stream(), th.cuda.current_stream()
        stream.wait_stream(present)
        with warnings.catch_warnings(record=True) as caught, th.cuda.stream(stream):
            warnings.simplefilter("always")
            th.cuda.set_sync_debug_mode("warn" if last else "default")
            try:
                result = self.function(*args, **kwargs)
            finally:
                th.cuda.set_sync_debug_mode("default")
        present.wait_stream(stream)
        for warning in caught:
            if _WAITED in str(warning.message):
                self.waits = True
            elif _PROTOTYPE not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return _copied(result)

    def _record(self, args: tuple, kwargs: dict[str, Any]) -> _Recording:
        arguments: list[th.Tensor] = []

        def placed(tensor: th.Tensor) -> th.Tensor:
            arguments.append(tensor.clone())
            return arguments[-1]

        args, kwargs = _changed((args, kwargs), placed)
        graph = th.cuda.CUDAGraph()
        # Other threads, such as the one that writes checkpoints, go on meanwhile.
        with th.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(*args, **kwargs)
        return _Recording(graph, arguments, result)


def _copied(value: Any) -> Any:
    """The same structure of copies, made at once."""
    originals: list[th.Tensor] = []
    copies: list[th.Tensor] = []

    def empty(tensor: th.Tensor) -> th.Tensor:
        originals.append(tensor)
        copies.append(th.empty_like(tensor))
        return copies[-1]

    copied = _changed(value, empty)
    if originals:
        th._foreach_copy_(copies, originals)
    return copied


def _changed(value: Any, change: Callable[[th.Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, th.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(part, change) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{name: _changed(part, change) for name, part in vars(value).items()})
    return value
