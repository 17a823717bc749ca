"""The best checkpoint of a run that is scored while it trains, and the file that names it, `best.json`.

A checkpoint that was scored has one file more, `scoreNNNNNN.json`. `best.json` repeats the best of these, so
that it can be written anew from what is there.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import dist_util
from ..errors import UserError
from ..io.files import read_object, write_text
from .checkpoint import Checkpoint, add_file, file_step

BEST = "best.json"


def add_score(checkpoint: Checkpoint, score: Mapping[str, Any]) -> None:
    """Add what a checkpoint's network scored; the checkpoint stays complete meanwhile.

    Args:
        checkpoint: the checkpoint.
        score: "metric" and its "value", the less the better; "of", what is equal where two scores compare;
            "weights", the name of what was scored, such as "ema_0.9999"; and whatever else is to be known.
    """
    text = json.dumps(dict(score), indent=1)
    add_file(checkpoint, "score", lambda path: path.write_text(text))


def read_score(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What `add_score` wrote; None if the checkpoint was not scored, or the file is damaged."""
    if not checkpoint.has("score"):
        return None
    try:
        score = read_object(checkpoint.path("score"))
        valid = math.isfinite(score["value"]) and isinstance(score["weights"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return score if valid else None


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The checkpoint with the lowest score, and the score; of equals the oldest; None if none was scored.

    Scores that do not compare with the newest one, because something was changed since, do not count.

    Args:
        checkpoints: the oldest first.
    """
    scored = [(checkpoint, score) for checkpoint in checkpoints if (score := read_score(checkpoint))]
    if not scored:
        return None
    kind = _kind(scored[-1][1])
    return min((pair for pair in scored if _kind(pair[1]) == kind), key=lambda pair: pair[1]["value"])


def _kind(score: Mapping[str, Any]) -> tuple[Any, ...]:
    return score.get("metric"), score.get("of"), score["weights"]


def write_best(directory: Path, checkpoint: Checkpoint, score: Mapping[str, Any]) -> None:
    """Bring a directory's best.json up to date: the step, the score, and what the files are called."""
    record = {
        "step": checkpoint.step,
        **score,
        "model": checkpoint.path("model").name,
        "scored": checkpoint.path(score["weights"]).name,
        "files": [name for name in checkpoint.files if name.startswith(("model", "ema_"))],
    }
    text = json.dumps(record, indent=1)
    path = directory / BEST
    if not path.is_file() or path.read_text(errors="replace") != text:
        write_text(path, text)


def local_weights(name: str, fetched: Path) -> tuple[str, Path]:
    """The weights that a name means, brought here by every host; of a best.json those that it names.

    Args:
        name: a path or a URL.
        fetched: where local copies of files at URLs lie.

    Returns:
        Their name, and where they lie here.
    """
    weights = dist_util.local_copy(name, fetched)
    if weights.name != BEST:
        return name, weights
    name = name.removesuffix(BEST) + read_best(weights)[1]
    return name, dist_util.local_copy(name, fetched)


def read_best(path: str | os.PathLike) -> tuple[int, str]:
    """The step of the checkpoint that a best.json names, and the name of the file that was scored.

    Raises:
        UserError: it is damaged, or names something else.
    """
    try:
        record = read_object(path)
        step, name = record["step"], record["scored"]
        if not isinstance(step, int) or not isinstance(name, str) or file_step(name) != step:
            raise ValueError("it names no file of a checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not name a checkpoint as best.json of a run does ({error})") from None
    return step, name
