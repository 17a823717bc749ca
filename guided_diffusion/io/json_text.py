"""JSON from files that may be damaged or hostile."""

import json
from typing import Any

_LONGEST = 300  # digits of a whole number; a float has 308


def parse_json(text: str | bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is no JSON, nests too deeply, or holds a whole number that no float can be.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
