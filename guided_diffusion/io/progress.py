"""How far a long task has come, for a person at a terminal."""

import sys
from typing import Any


def progress_bar(total: int | None, description: str, *, initial: int = 0, active: bool = True) -> Any:
    """A tqdm bar on a terminal; elsewhere, or where not `active`, one that shows nothing."""
    from tqdm import tqdm

    hidden = not active or not sys.stderr.isatty()
    return tqdm(total=total, desc=description, initial=initial, disable=hidden, dynamic_ncols=True)
