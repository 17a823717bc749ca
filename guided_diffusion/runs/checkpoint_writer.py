"""Saving off the training path: a step's time does not show a save, and a failed save does not end a run."""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch as th
from safetensors import SafetensorError

from ..errors import UserError
from .checkpoint import (
    Retention,
    complete_checkpoints,
    drop_file,
    file_names,
    remove_checkpoint,
    save_checkpoint,
)


class CheckpointWriter:
    """Writes checkpoints one after the other in a thread of its own.

    A save that fails (a full disk) is told, leaves nothing behind, and is tried again with the next
    checkpoint; the older checkpoints are not touched before a newer one is complete.

    Args:
        directory: where to.
        report: told what happened, one line each.
        retention: which of them stay; by default all.
        publish: called in the thread after each save. Its failure is told, and it is called again
            after the next save.
        description: of the network, see `checkpoint.read_description`.
        weights_format: of its files, see `run.weights_format`.
    """

    def __init__(
        self,
        directory: Path,
        report: Callable[[str], None],
        retention: Retention | None = None,
        publish: Callable[[], None] | None = None,
        description: Mapping[str, Any] | None = None,
        weights_format: str = "pt",
    ):
        self.directory, self.report = directory, report
        self.retention, self.publish = retention or Retention(), publish
        self.description, self.weights_format = description, weights_format
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[str] | None = None
        self._failure = ""

    def submit(self, step: int, contents: Mapping[str, Any]) -> None:
        """Save a checkpoint soon; waits for the one before. `contents` are copied at once."""
        self.wait()
        held = {name: content if callable(content) else to_cpu(content) for name, content in contents.items()}
        self._pending = self._thread.submit(self._save, step, held)

    def wait(self) -> None:
        """Wait for the save under way, if any."""
        if self._pending is not None:
            self._failure = self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait, and end the thread.

        Raises:
            UserError: the last checkpoint could not be saved.
        """
        self.wait()
        self._thread.shutdown()
        if self._failure:
            raise UserError(f"the last checkpoint could not be saved: {self._failure}")

    def _save(self, step: int, contents: Mapping[str, Any]) -> str:
        try:
            save_checkpoint(self.directory, step, contents, self.description, self.weights_format)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch tells a full disk by RuntimeError
            reason = f"{_first_line(error)}; {_free_space(self.directory)}"
            self.report(
                f"WARNING: could not save step {step}: {reason}; training goes on, older checkpoints stay, "
                "and the next save tries again"
            )
            with contextlib.suppress(OSError):
                for name in contents:
                    for file in file_names(name, step, self.weights_format):
                        (self.directory / file).unlink(missing_ok=True)
            return reason
        self.report(f"saved step {step} to {self.directory}")
        try:
            self._prune()
        except OSError as error:  # what is superfluous stays; nothing is lost
            self.report(f"WARNING: could not remove older checkpoints: {_first_line(error)}")
        if self.publish is not None:
            try:
                self.publish()
            except (UserError, OSError) as error:
                self.report(
                    f"WARNING: step {step} is saved here alone: {_first_line(error)}; training goes on, "
                    "and the next save tries again"
                )
        return ""

    def _prune(self) -> None:
        checkpoints = complete_checkpoints(self.directory)
        steps = [checkpoint.step for checkpoint in checkpoints]
        without_pool, superfluous = self.retention.without_pool(steps), self.retention.superfluous(steps)
        for checkpoint in checkpoints:
            if checkpoint.step in superfluous:
                remove_checkpoint(checkpoint)
            elif checkpoint.step in without_pool:
                drop_file(checkpoint, "pool")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _free_space(directory: Path) -> str:
    """Torch's words for a full disk do not say so."""
    try:
        return f"{shutil.disk_usage(directory).free / 1e6:.0f} MB are free"
    except OSError as error:
        return _first_line(error)


def to_cpu(value: Any) -> Any:
    """A copy on the CPU of nested containers of tensors, which later training does not change."""
    if isinstance(value, th.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value
