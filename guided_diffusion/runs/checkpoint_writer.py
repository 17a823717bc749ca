"""Saving off the training path: a step's time does not show a save, and a failed save does not end a run."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch as th
from safetensors import SafetensorError

from ..errors import UserError, first_line
from .best import add_score, best_checkpoint, write_best
from .checkpoint import (
    Checkpoint,
    Retention,
    complete_checkpoints,
    drop_file,
    file_names,
    remove_checkpoint,
    save_checkpoint,
)


class CheckpointWriter:
    """Writes checkpoints one after the other, each in a thread of its own.

    A save that fails (a full disk) is told, leaves nothing behind, and is tried again with the next
    checkpoint; the older checkpoints are not touched before a newer one is complete.

    Args:
        directory: where to.
        report: told what happened, one line each.
        retention: which of them stay; by default all.
        publish: called in the thread after each save. Its failure is told, and it is called again
            after the next save.
        description: of the network, see `io.description.read_description`.
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
        self._pending: Future[str] | None = None
        self._failure = ""

    def submit(self, step: int, contents: Mapping[str, Any]) -> None:
        """Save a checkpoint soon; waits for the one before. `contents` are copied at once."""
        self.wait()
        held = {name: content if callable(content) else to_cpu(content) for name, content in contents.items()}
        self._start(self._save, step, held)

    def add_score(self, step: int, score: Mapping[str, Any]) -> None:
        """Add what the network scored to the checkpoint that was submitted last; see `best.add_score`."""
        self.wait()
        self._start(self._add_score, step, dict(score), self._failure)

    def _start(self, work: Callable[..., str], *arguments: Any) -> None:
        """Do it in a thread that ends with it: its OpenMP threads, which torch starts for every thread that
        computes, would make more than there are cores, and then GNU OpenMP lets all of them fall asleep at
        once where they wait: training went on at half its speed.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = thread.submit(work, *arguments)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the save under way, if any."""
        if self._pending is not None:
            self._failure = self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait.

        Raises:
            UserError: the last checkpoint could not be saved.
        """
        self.wait()
        if self._failure:
            raise UserError(f"the last checkpoint could not be saved: {self._failure}")

    def _save(self, step: int, contents: Mapping[str, Any]) -> str:
        try:
            save_checkpoint(self.directory, step, contents, self.description, self.weights_format)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch tells a full disk by RuntimeError
            reason = f"{first_line(error)}; {_free_space(self.directory)}"
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
        self._tidy(step)
        return ""

    def _add_score(self, step: int, score: Mapping[str, Any], failure: str) -> str:
        """Add a score, unless its checkpoint could not be saved, which `failure` then tells."""
        try:
            for checkpoint in complete_checkpoints(self.directory):
                if checkpoint.step == step:
                    add_score(checkpoint, score)
        except (OSError, ValueError) as error:
            self.report(f"WARNING: could not keep the score of step {step}: {first_line(error)}")
        self._tidy(step)
        return failure

    def _tidy(self, step: int) -> None:
        """What there is to do after a save: name the best, remove what is superfluous, publish."""
        checkpoints = complete_checkpoints(self.directory)
        best = self.note_best(checkpoints)
        try:
            self._prune(checkpoints, best)
        except OSError as error:  # what is superfluous stays; nothing is lost
            self.report(f"WARNING: could not remove older checkpoints: {first_line(error)}")
        if self.publish is not None:
            try:
                self.publish()
            except (UserError, OSError) as error:
                self.report(
                    f"WARNING: step {step} is saved here alone: {first_line(error)}; training goes on, "
                    "and the next save tries again"
                )

    def note_best(self, checkpoints: Sequence[Checkpoint]) -> int | None:
        """Bring best.json up to date: the best one's step; None if none of the checkpoints was scored."""
        if (best := best_checkpoint(checkpoints)) is None:
            return None
        try:
            write_best(self.directory, *best)
        except OSError as error:
            self.report(f"WARNING: could not name the best checkpoint: {first_line(error)}")
        return best[0].step

    def _prune(self, checkpoints: Sequence[Checkpoint], best: int | None) -> None:
        steps = [checkpoint.step for checkpoint in checkpoints]
        without_pool = self.retention.without_pool(steps)
        superfluous = self.retention.superfluous(steps, best)
        for checkpoint in checkpoints:
            if checkpoint.step in superfluous:
                remove_checkpoint(checkpoint)
            elif checkpoint.step in without_pool:
                drop_file(checkpoint, "pool")


def _free_space(directory: Path) -> str:
    """Torch's words for a full disk do not say so."""
    try:
        return f"{shutil.disk_usage(directory).free / 1e6:.0f} MB are free"
    except OSError as error:
        return first_line(error)


def to_cpu(value: Any) -> Any:
    """A copy on the CPU of nested containers of tensors, which later training does not change."""
    if isinstance(value, th.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value
