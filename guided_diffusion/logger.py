"""What a run records: log.txt, progress.csv, TensorBoard events and, if asked for, W&B."""

import csv
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config.loading import mapping_text
from .errors import UserError, first_line, message_of
from .io.files import atomic_path, write_text
from .io.json_lines import append_line, ends_whole, read_lines
from .io.progress import say, warn


class RunLog:
    """The record of a run in one directory; ranks other than 0 record nothing.

    Args:
        directory: where `log.txt`, `progress.csv` and the event files lie.
        active: whether this process records.
        wandb: also record to Weights & Biases; project and entity come from its own environment
            variables (WANDB_PROJECT, WANDB_ENTITY). A directory that is continued continues its run there,
            whose id is kept in `wandb_id`.
        name: the run's name there.
        config: the run's configuration, shown there and in TensorBoard.

    Attributes:
        begin: writes down what the run is; called when everything is set up, before the first iteration.
        publish: brings the directory's copy elsewhere up to date, if it has one; the writer of
            checkpoints calls it.

    Raises:
        UserError: W&B wanted, but not installed, or it refuses.
    """

    def __init__(
        self,
        directory: Path,
        *,
        active: bool = True,
        wandb: bool = False,
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.directory = directory
        self.active = active
        self.begin: Callable[[], None] = lambda: None
        self.publish: Callable[[], None] | None = None
        self._events: Any = None
        self._wandb: Any = None
        self._config = dict(config or {})
        self._last_step = -1.0  # of the last row
        self._kept_step: int | None = None  # up to which an earlier part of the run is kept
        self._has_events = False  # whether this part has begun a file of them
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if wandb:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise UserError(f"--wandb: {error} (pip install wandb)") from None
            kept = directory / "wandb_id"
            try:
                self._wandb = wandb_module.init(
                    id=kept.read_text().strip() if kept.exists() else None,
                    resume="allow",
                    name=name,
                    dir=str(directory),
                    config=self._config,
                )
            except (wandb_module.Error, ValueError) as error:  # the latter of a wrong WANDB_* variable
                raise UserError(f"--wandb: {first_line(error)}") from None
            write_text(kept, self._wandb.id)

    def info(self, message: str) -> None:
        """Print a line, above a progress bar if there is one, and keep it in log.txt with the time."""
        if not self.active:
            return
        say(message)
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        with (
            self.tolerant(),
            open(self.directory / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(f"{now}  {message}\n")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step everywhere; further values of it come into the same row."""
        if not self.active:
            return
        with self.tolerant():
            self._append_csv({"step": step, **values})
        with self.tolerant():
            from tensorboardX.summary import scalar

            self._write_events(step, [scalar(name, value) for name, value in values.items()])
        self._to_wandb(lambda wandb: self._wandb.log(dict(values), step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Record a PNG that belongs to a step."""
        if not self.active:
            return
        with self.tolerant():
            from PIL import Image
            from tensorboardX.proto.summary_pb2 import Summary

            with Image.open(path) as image:
                width, height = image.size
            encoded = Summary.Image(width=width, height=height, encoded_image_string=path.read_bytes())
            self._write_events(step, [Summary(value=[Summary.Value(tag=name, image=encoded)])])
        self._to_wandb(lambda wandb: self._wandb.log({name: wandb.Image(str(path))}, step=step))

    def pool(self, step: int, record: Mapping[str, Any]) -> None:
        """Add a line to pool.jsonl: where the entries of the pool are."""
        if not self.active:
            return
        with self.tolerant():
            append_line(self.directory / "pool.jsonl", {"step": step, **record})

    def last(self, name: str) -> float:
        """The newest number in a column of progress.csv; 0 if there is none."""
        path = self.directory / "progress.csv"
        if not self.active or not path.exists():
            return 0.0
        return next((row[name] for row in reversed(read_progress(path)) if name in row), 0.0)

    def drop_rows_after(self, step: int) -> None:
        """Forget what is recorded of later steps: a resumed run writes it again."""
        if not self.active:
            return
        self._kept_step = step
        with self.tolerant():
            if (path := self.directory / "progress.csv").exists():
                rows = [row for row in _raw_rows(path) if float(row["step"]) <= step]
                self._rewrite(rows)
                self._last_step = float(rows[-1]["step"]) if rows else -1.0
            if (path := self.directory / "pool.jsonl").exists():
                kept = [record for record in read_pool_records(path) if record["step"] <= step]
                write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def close(self) -> None:
        """Flush and close what is open."""
        with self.tolerant():
            if self._events is not None:
                self._events.close()
        self._to_wandb(lambda wandb: self._wandb.finish())

    def _to_wandb(self, record: Callable[[Any], None]) -> None:
        """Record something there, if W&B is wanted; `record` takes its module."""
        if self._wandb is None:
            return
        import wandb

        try:
            record(wandb)
        except Exception as error:  # of whatever kind: its own process may have ended, by a signal or a crash
            self._wandb = None
            warn(f"W&B: {message_of(error)}; nothing more is recorded there")

    def _write_events(self, step: int, summaries: Sequence[Any]) -> None:
        # Not its SummaryWriter, whose thread dies of a full disk and whose queue then blocks for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        try:
            if self._events is None:
                self._events = EventsWriter(str(self.directory / "events"), f".{os.getpid()}.{step}")
                if not self._has_events:
                    # Readers then forget what an interrupted run wrote from that step on.
                    first = step if self._kept_step is None else self._kept_step + 1
                    start = SessionLog(status=SessionLog.START)
                    self._events.write_event(Event(wall_time=time.time(), step=first, session_log=start))
                    if self._config:
                        block = text("config", f"```yaml\n{mapping_text(self._config)}```")
                        self._events.write_event(Event(wall_time=time.time(), step=step, summary=block))
                    self._has_events = True
            for summary in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()
        except OSError:
            self._events = None  # its file may end in half a record: the next row begins another
            raise

    @contextmanager
    def tolerant(self) -> Iterator[None]:
        """A record that cannot be written (a full disk) is told on standard error; the run goes on."""
        try:
            yield
        except OSError as error:
            warn(f"could not write the record: {error}")

    def _append_csv(self, row: dict[str, float]) -> None:
        path = self.directory / "progress.csv"
        if row["step"] == self._last_step:
            rows = _raw_rows(path) if path.exists() else []
            if rows and float(rows[-1]["step"]) == row["step"]:
                self._rewrite([*rows[:-1], {**rows[-1], **row}])
                return
        self._last_step = row["step"]
        header: list[str] = []
        whole = True  # whether the last line is: a kill or a full disk may have cut it
        if path.exists():
            with open(path, newline="", errors="replace") as file:
                header = next(csv.reader(file), [])
            whole = ends_whole(path)
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


def read_pool_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a pool.jsonl (`TeacherSource.pool_record`); one that a kill cut short is left out."""
    records = (record for _, record in read_lines(path) if isinstance(record, dict))
    return [record for record in records if isinstance(record.get("step"), int)]


def read_progress(path: str | os.PathLike) -> list[dict[str, float]]:
    """The rows of a progress.csv, each with the columns it has a number in."""
    return [{name: float(value) for name, value in row.items() if value} for row in _raw_rows(path)]


def _raw_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """The whole rows: one that a kill cut short, or that holds something else than numbers, is left out."""
    with open(path, newline="", errors="replace") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].replace("\0", "").splitlines()
    lines = [line for line in lines if len(line) < csv.field_size_limit()]
    return [row for row in csv.DictReader(lines) if _is_whole(row)]


def _is_whole(row: dict[str, Any]) -> bool:
    try:
        for value in row.values():
            float(value or 0)
        return bool(row["step"])
    except (KeyError, TypeError, ValueError):
        return False
