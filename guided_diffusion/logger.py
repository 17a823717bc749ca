"""What a run records: log.txt, progress.csv, TensorBoard events and, if asked for, W&B."""

import csv
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError
from .io.files import atomic_path


class RunLog:
    """The record of a run in one directory; ranks other than 0 record nothing.

    Args:
        directory: where `log.txt`, `progress.csv` and the event files lie.
        active: whether this process records.
        wandb: also record to Weights & Biases; project and entity come from its own environment
            variables (WANDB_PROJECT, WANDB_ENTITY).
        name: the run's name there.

    Attributes:
        publish: brings the directory's copy elsewhere up to date, if it has one; the writer of
            checkpoints calls it.

    Raises:
        UserError: W&B wanted but not installed.
    """

    def __init__(self, directory: Path, *, active: bool = True, wandb: bool = False, name: str = ""):
        self.directory = directory
        self.active = active
        self.publish: Callable[[], None] | None = None
        self._events: Any = None
        self._wandb: Any = None
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if wandb:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise UserError(f"--wandb: {error} (pip install wandb)") from None
            self._wandb = wandb_module.init(name=name, dir=str(directory), resume="allow")

    def info(self, message: str) -> None:
        """Print a line and keep it in log.txt with the time."""
        if not self.active:
            return
        print(message, flush=True)
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        with self.tolerant(), open(self.directory / "log.txt", "a") as file:
            file.write(f"{now}  {message}\n")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step everywhere."""
        if not self.active:
            return
        with self.tolerant():
            self._append_csv({"step": step, **values})
        with self.tolerant():
            try:
                self._write_events(step, values)
            except OSError:
                self._events = None  # its file may end in half a record: the next row begins another
                raise
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def drop_rows_after(self, step: int) -> None:
        """Forget rows of progress.csv beyond a step: a resumed run writes them again."""
        path = self.directory / "progress.csv"
        if not self.active or not path.exists():
            return
        with self.tolerant():
            self._rewrite([row for row in _raw_rows(path) if float(row["step"]) <= step])

    def close(self) -> None:
        """Flush and close what is open."""
        with self.tolerant():
            if self._events is not None:
                self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_events(self, step: int, values: Mapping[str, float]) -> None:
        # Not its SummaryWriter, whose thread dies of a full disk and whose queue then blocks for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self._events is None:
            self._events = EventsWriter(str(self.directory / "events"), f".{os.getpid()}.{step}")
            # Readers then forget what an interrupted run wrote from this step on.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """A record that cannot be written (a full disk) is told on standard error; the run goes on."""
        try:
            yield
        except OSError as error:
            print(f"WARNING: could not write the record: {error}", file=sys.stderr, flush=True)

    def _append_csv(self, row: dict[str, float]) -> None:
        path = self.directory / "progress.csv"
        header: list[str] = []
        whole = True  # whether the last line is: a kill or a full disk may have cut it
        if path.exists():
            with open(path, newline="", errors="replace") as file:
                header = next(csv.reader(file), [])
            with open(path, "rb") as last, suppress(OSError):  # of an empty file
                last.seek(-1, os.SEEK_END)
                whole = last.read() == b"\n"
        if header and whole and set(row) <= set(header):
            with open(path, "a", newline="") as file:
                csv.DictWriter(file, header).writerow(row)
        else:  # a new column: write the file anew
            self._rewrite([*(_raw_rows(path) if header else []), row])

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        with (
            atomic_path(self.directory / "progress.csv") as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def read_progress(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a progress.csv, each with the columns it has a number in."""
    return [{name: float(value) for name, value in row.items() if value} for row in _raw_rows(path)]


def _raw_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """The whole rows: one that a kill cut short, or that holds something else than numbers, is left out."""
    with open(path, newline="", errors="replace") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].replace("\0", "").splitlines()
    return [row for row in csv.DictReader(lines) if _is_whole(row)]


def _is_whole(row: dict[str, Any]) -> bool:
    try:
        return bool(row["step"]) and all(not value or float(value) is not None for value in row.values())
    except (KeyError, TypeError, ValueError):
        return False
