"""What an evaluation returns, and how it is written down."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.io.files import short_names, write_text
from guided_diffusion.io.json_text import parse_json
from guided_diffusion.io.shipped import installed_versions


@dataclass(frozen=True)
class DigitsScores:
    """Scores of digits.

    Attributes:
        fd: digits-FD, the Fréchet distance of the classifier's 64-d features; 0 is best.
        confidence: mean probability of the likeliest class. No quality measure: it is high on
            collapsed sets too.
        class_balance: entropy of the histogram of predicted classes over log 10, 0..1.
        noise_share: share of images that are rougher than any real digit (`digits.is_noise`).
        histogram: how many images are predicted to be each digit, 0 to 9.
        precision: improved precision of the 64-d features, k = 3, 0..1.
        recall: improved recall of them, k = 3, 0..1.
    """

    fd: float
    confidence: float
    class_balance: float
    noise_share: float
    histogram: tuple[int, ...]
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class InceptionScores:
    """Scores on Inception features; None where the reference holds too little, or not asked for.

    Attributes:
        inception_score: Inception Score, splits of 5000; higher is better.
        fid: Fréchet Inception distance of the 2048-d features.
        sfid: the same of the 2023-d spatial features.
        precision: improved precision, k = 3, 0..1.
        recall: improved recall, k = 3, 0..1.
        kid: kernel Inception distance (not multiplied by 1000).
        density: density, k = 5; can exceed 1.
        coverage: coverage, k = 5, 0..1.
    """

    inception_score: float
    fid: float
    sfid: float | None
    precision: float | None
    recall: float | None
    kid: float | None = None
    density: float | None = None
    coverage: float | None = None


@dataclass(frozen=True)
class Provenance:
    """What a result was computed from.

    Attributes:
        samples_provenance: what the sample file says of its making; None if it says nothing.
        n: number of sample images.
        n_reference: number of reference images, None where only their statistics are stored.
        reference_statistics: "computed", "cached" or "stored" (as an ADM reference batch has them).
        intervals: score -> (low, high), empty unless asked for.
        interval_replicates: half-samples the intervals come from.
    """

    samples: str
    samples_sha256: str
    samples_provenance: dict[str, Any] | None
    n: int
    reference: str
    reference_sha256: str
    n_reference: int | None
    reference_statistics: str
    backend: str
    weights_sha256: str
    seed: int
    intervals: dict[str, tuple[float, float]]
    interval_replicates: int
    versions: dict[str, str]


@dataclass(frozen=True)
class DigitsResult(DigitsScores, Provenance):
    """Scores of one sample file by the digits backend."""


@dataclass(frozen=True)
class InceptionResult(InceptionScores, Provenance):
    """Scores of one sample file by the `tensorflow` or the `torch` backend."""


Scores = DigitsScores | InceptionScores
Result = DigitsResult | InceptionResult


def values(scores: Scores) -> dict[str, float]:
    """The numbers among the scores that were computed, by name."""
    kind = DigitsScores if isinstance(scores, DigitsScores) else InceptionScores
    pairs = ((field.name, getattr(scores, field.name)) for field in dataclasses.fields(kind))
    return {name: value for name, value in pairs if isinstance(value, float)}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that take part in a score."""
    return installed_versions("numpy", "scipy", "torch", "torch-fidelity", "tensorflow", "tensorflow-cpu")


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write results as a JSON list of objects, one per sample file, atomically."""
    text = json.dumps([dataclasses.asdict(result) for result in results], indent=2)
    write_text(path, text + "\n")


def require_replaceable(path: Path) -> None:
    """Refuse to write results over a file that holds none.

    Raises:
        UserError: it holds something else.
    """
    if not path.stat().st_size:
        return
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not (
        isinstance(found, list) and found and all(isinstance(one, dict) and "samples" in one for one in found)
    ):
        raise UserError(f"{path}: holds no results, and would be replaced; name another file")


# What a score is called, its lowest and its highest value.
SCORES: dict[str, tuple[str, float, float]] = {
    "fd": ("digits-FD", 0.0, math.inf),
    "confidence": ("confidence", 0.0, 1.0),
    "class_balance": ("class balance", 0.0, 1.0),
    "noise_share": ("noise share", 0.0, 1.0),
    "inception_score": ("Inception Score", 1.0, math.inf),
    "fid": ("FID", 0.0, math.inf),
    "sfid": ("sFID", 0.0, math.inf),
    "precision": ("Precision", 0.0, 1.0),
    "recall": ("Recall", 0.0, 1.0),
    "kid": ("KID", -math.inf, math.inf),
    "density": ("Density", 0.0, math.inf),
    "coverage": ("Coverage", 0.0, 1.0),
}
_PROVENANCE = ("model", "step", "noise_schedule", "diffusion_steps", "sampler", "steps", "seed")


def format_result(result: Result) -> str:
    """One result, a score to a line, with its interval where there is one."""
    lines = []
    for name, value in values(result).items():
        interval = ""
        if name in result.intervals:
            low, high = result.intervals[name]
            interval = f"  [{low:.6g}, {high:.6g}]"
        lines.append(f"{SCORES[name][0]}: {value:.6g}{interval}")
    if isinstance(result, DigitsResult):
        lines.append("predicted 0-9: " + " ".join(map(str, result.histogram)))
    if told := _told(result.samples_provenance or {}):
        lines.append(f"samples made by: {told}")
    return "\n".join(lines)


def _told(provenance: dict[str, Any]) -> str:
    """The gist of a provenance, of whatever it has; one line whatever it holds."""
    process = provenance.get("process")
    known = {**(process if isinstance(process, dict) else {}), **provenance}
    found = ((name, known.get(name)) for name in _PROVENANCE)
    pairs = [(name, str(value)[:60]) for name, value in found if isinstance(value, (str, int, float))]
    return ", ".join(f"{name} {value if value.isprintable() else ascii(value)}" for name, value in pairs)


def format_table(results: Sequence[Result]) -> str:
    """Several results, a file to a row; files are told apart by as little of their path as it takes."""
    names = [name for name in SCORES if any(name in values(result) for result in results)]
    rows = [["samples", "N", *(SCORES[name][0] for name in names)]]
    for label, result in zip(short_names([result.samples for result in results]), results, strict=True):
        scores = values(result)
        cells = [f"{scores[name]:.5g}" if name in scores else "-" for name in names]
        rows.append([label, str(result.n), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
