"""What a run records: log.txt, progress.csv, TensorBoard events and, if asked for, W&B."""

import csv
import datetime
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import atomic_path


class RunLog:
    """The record of a run in one directory; ranks other than 0 record nothing.

    Args:
        directory: where `log.txt`, `progress.csv` and the event files lie.
        active: whether this process records.
        wandb: also record to Weights & Biases; project and entity come from its own environment
            variables (WANDB_PROJECT, WANDB_ENTITY).
        name: the run's name there.

    Raises:
        UserError: W&B wanted but not installed.
    """

    def __init__(self, directory: Path, *, active: bool = True, wandb: bool = False, name: str = ""):
        self.directory = directory
        self.active = active
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
        with self._tolerant(), open(self.directory / "log.txt", "a") as file:
            file.write(f"{now}  {message}\n")

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step everywhere."""
        if not self.active:
            return
        with self._tolerant():
            self._append_csv({"step": step, **values})
        with self._tolerant():
            if self._events is None:
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(self.directory))
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def drop_rows_after(self, step: int) -> None:
        """Forget rows of progress.csv beyond a step: a resumed run writes them again."""
        path = self.directory / "progress.csv"
        if not self.active or not path.exists():
            return
        self._rewrite([row for row in _raw_rows(path) if float(row["step"]) <= step])

    def close(self) -> None:
        """Flush and close what is open."""
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A record that cannot be written (a full disk) is told on standard error; the run goes on."""
        try:
            yield
        except OSError as error:
            print(f"WARNING: could not write the record: {error}", file=sys.stderr, flush=True)

    def _append_csv(self, row: dict[str, float]) -> None:
        path = self.directory / "progress.csv"
        header: list[str] = []
        if path.exists():
            with open(path, newline="") as file:
                header = next(csv.reader(file), [])
        if header and set(row) <= set(header):
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
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def progress_bar(total: int | None, description: str, *, initial: int = 0, active: bool = True) -> Any:
    """A tqdm bar on a terminal; elsewhere, or where not `active`, one that shows nothing."""
    from tqdm import tqdm

    hidden = not active or not sys.stderr.isatty()
    return tqdm(total=total, desc=description, initial=initial, disable=hidden, dynamic_ncols=True)
