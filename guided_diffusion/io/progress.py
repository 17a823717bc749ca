"""How far long work has come, for a person: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO, TypeVar

from ..errors import printable

_LINE_SEC = 30.0  # between lines; TCCD_PROGRESS_SECONDS sets another time
Item = TypeVar("Item")


class Progress:
    """A bar on stderr, or lines there. Use it as a context manager.

    Args:
        total: units in all; None if that is not known.
        what: what is being done.
        unit: its parts, plural; "B" counts bytes.
        initial: units that had been done before.
        active: tell anything at all; false on ranks other than 0.
    """

    def __init__(
        self, total: int | None, what: str, unit: str, *, initial: int = 0, active: bool = True
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.initial = self.done = initial
        self._facts: dict[str, str] = {}
        self._began = self._told = time.monotonic()
        self._seconds = _line_seconds() if active else float("inf")
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                desc=what,
                unit=unit if unit == "B" else f" {unit}",
                unit_scale=unit == "B",
                initial=initial,
                dynamic_ncols=True,
                leave=None,  # a bar below another one goes when it is done
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int = 1) -> None:
        """Count units that were just done."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)
        elif time.monotonic() - self._told >= self._seconds:
            self._told = time.monotonic()
            say(self._line(), sys.stderr)

    def show(self, facts: Mapping[str, str]) -> None:
        """Show some facts from here on. Whoever has them has just told more: the next line waits anew."""
        self._facts, self._told = dict(facts), time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(self._facts)

    def _line(self) -> str:
        of_all = "" if self.total is None else f" of {self.total}"
        rate = (self.done - self.initial) / max(time.monotonic() - self._began, 1e-9)
        told = [f"{rate:.3g}/s"]
        if self.total is not None and rate:
            told.append(f"{_duration((self.total - self.done) / rate)} left")
        told += [f"{name} {value}" for name, value in self._facts.items()]
        return f"{self.what}: {self.done}{of_all} {self.unit} ({', '.join(told)})"


def tracked(items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
    """The items in order, with `Progress` over them."""
    with Progress(len(items), what, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line to a file (stdout by default), above the bars if there are any."""
    file, line = file or sys.stdout, printable(line)
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=file)
        file.flush()
    else:
        print(line, file=file, flush=True)


def warn(message: str) -> None:
    """Tell on stderr, as `say` does, what is amiss but ends nothing."""
    say(f"WARNING: {message}", sys.stderr)


def _duration(seconds: float) -> str:
    """Such as 42 s, 3 min or 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _line_seconds() -> float:
    try:
        return float(os.environ["TCCD_PROGRESS_SECONDS"])
    except (KeyError, ValueError):
        return _LINE_SEC
