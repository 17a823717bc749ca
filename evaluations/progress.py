"""How long work tells that it goes on: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

_LINE_SEC = 30.0
Item = TypeVar("Item")


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], object]]:
    """Give a function to call with the number of units just done; what it tells goes to stderr.

    Args:
        total: units in all; None if it is not known.
        what: what is being done.
        unit: one of its parts, singular; "B" counts bytes.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False) as bar:
            yield bar.update
        return
    done, last = 0, time.monotonic()

    def count(units: int) -> None:
        nonlocal done, last
        done += units
        if time.monotonic() - last >= _LINE_SEC:
            last = time.monotonic()
            of_all = "" if total is None else f" of {total}"
            print(f"{what}: {done}{of_all} {unit}", file=sys.stderr, flush=True)

    yield count


def tracked(items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
    """The items in order, with `progress` over them."""
    with progress(len(items), what, unit) as advance:
        for item in items:
            yield item
            advance(1)
