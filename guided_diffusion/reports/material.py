"""What a report is made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A PNG: its bytes as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Grid:
    """What a run drew at a step: by the averaged weights and, if it did, by those being trained."""

    step: int
    ema: Picture | None
    raw: Picture | None


@dataclass
class Run:
    """A run directory; whatever is missing or damaged there is empty here, and `notes` say so.

    Attributes:
        path, label: where it lies, and what tells it from the others.
        record: its run.json.
        rows: its progress.csv, as `read_progress` returns it, with finite numbers alone. Rows also have
            "speed", the iterations per second since the row before. A row of scores alone has its "samples"
            and "seconds" from those beside it.
        keys: its resolved configuration, by "section.key".
        pool: its pool.jsonl, the oldest first.
        grids, teacher: its grids of samples, the oldest first, and the teacher's from the same noise.
        best: its best.json.
        weights: SHA-256 of the weights in its checkpoints -> their step.
        notes: what could not be read, and why.
    """

    path: Path
    label: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    pool: list[dict[str, Any]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    teacher: Picture | None = None
    best: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its configuration; older runs do not say it, and go by their directory's."""
        return str(self.record.get("name") or self.path.name)[:200]

    @property
    def began_at(self) -> int:
        """The iterations that another run had done whose checkpoint it began from; 0 if it began anew."""
        step = self.record.get("began_at")
        return step if isinstance(step, int) and 0 <= step < 1 << 53 else 0


@dataclass(frozen=True)
class Score:
    """The evaluator's record of one sample file.

    Attributes:
        label: the sample file.
        n: number of images.
        values, intervals: by the score's name.
        run: the number of the run whose weights drew the samples; None if it is none of them.
        step: of those weights.
    """

    label: str
    n: int
    backend: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    run: int | None
    step: int | None


@dataclass(frozen=True)
class Samples:
    """A folder that image_sample.py wrote: its grid, and what sampling.json says of it."""

    label: str
    picture: Picture | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """Everything that a report shows."""

    runs: list[Run]
    scores: list[Score]
    samples: list[Samples]
    notes: list[str]
