"""What a report says in words and numbers: how the runs went, what differs between them, and their scores."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .material import Material, Run

_LONGEST = 400  # characters of a value from a file
_MOST_SECONDS = 10**12  # about what a timedelta takes
# Differ between any two runs, and say nothing about what is compared.
_PLACES = ("teacher.tempfile", "student.resume_checkpoint", "resume_checkpoint")


@dataclass(frozen=True)
class Table:
    """A table: what its rows are called, the columns, and each row's name with its cells."""

    what: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def overview(material: Material) -> Table:
    """How each run went."""
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("ended", ending),
        ("iterations", lambda run: whole(last(run, "step"))),
        ("images seen", lambda run: whole(last(run, "samples"))),
        ("training time", lambda run: duration(last(run, "seconds"))),
        ("throughput", _throughput),
        ("peak memory", lambda run: _text(run.record.get("peak_memory"))),
        ("skipped iterations", _skipped),
        ("best checkpoint", _best),
        ("started", lambda run: _text(run.record.get("started")).replace("T", " ")),
        ("continued", _continued),
    ]
    return _by_run(material, facts)


def provenance(material: Material) -> Table:
    """What the results may depend on besides the configuration."""
    facts: list[tuple[str, Callable[[Run], str]]] = [
        ("directory", lambda run: str(run.path)),
        ("command", lambda run: _joined(run.record.get("command"), " ")),
        ("revision", lambda run: _text(run.record.get("git_revision"))),
        ("machines", lambda run: _joined(run.record.get("ranks"), "; ")),
        ("threads", lambda run: _text(run.record.get("threads"))),
    ]
    told = [run.record.get("versions") for run in material.runs]
    names = dict.fromkeys(name for versions in told if isinstance(versions, dict) for name in versions)
    facts += [(str(name), lambda run, name=name: _version(run, name)) for name in names]  # type: ignore[misc]
    return _by_run(material, facts)


def differences(material: Material) -> Table:
    """The keys in which the configurations differ."""
    keys = dict.fromkeys(key for run in material.runs if run.keys for key in run.keys)
    told = [run for run in material.runs if run.keys]
    rows = []
    for key in keys:
        values = [run.keys.get(key, "–") for run in told]
        if key not in _PLACES and len(set(values)) > 1:
            rows.append((key, [_text(run.keys.get(key)) for run in material.runs]))
    return Table("key", [run.label for run in material.runs], rows)


def losses(material: Material, terms: Sequence[str]) -> Table:
    """Each term at the end of each run, over all timesteps and by quartile."""
    parts = {"all": "", "cleanest quarter": "_q0", "2nd": "_q1", "3rd": "_q2", "noisiest quarter": "_q3"}
    rows = []
    for term in terms:
        for run in material.runs:
            name = f"{term}, {run.label}" if len(material.runs) > 1 else term
            cells = [number(first(run, term)), *(number(last(run, term + end)) for end in parts.values())]
            rows.append((name, cells))
    return Table("term", ["all, at the start", *(f"{part}, at the end" for part in parts)], rows)


def scores(material: Material, names: Mapping[str, str]) -> Table:
    """The evaluator's records, with their intervals."""
    shown = [name for name in names if any(name in score.values for score in material.scores)]
    rows = []
    for score in material.scores:
        run = material.runs[score.run].label if score.run is not None else "–"
        cells = [run, whole(score.step), whole(score.n)]
        for name in shown:
            cell = number(score.values.get(name))
            if name in score.intervals:
                low, high = score.intervals[name]
                cell += f" [{low:.4g},\u00a0{high:.4g}]"
            cells.append(cell)
        rows.append((score.label, cells))
    return Table("samples", ["run", "iteration", "images", *(names[name] for name in shown)], rows)


def pools(material: Material) -> Table:
    """How old what is in the pools is."""
    rows = []
    for run in material.runs:
        if run.pool:
            now = run.pool[-1]
            entries = sum(now["levels"]) + now["clean"]
            restarts = sum(record["restarts"] for record in run.pool[1:])  # each those since the one before
            iterations = now["step"] - run.pool[0]["step"]
            life = entries * iterations / restarts if restarts else None
            age = now["T"] - now["mean_level"]
            cells = [
                whole(entries),
                whole(restarts),
                f"{whole(life)} iterations" if life else "no chain has ended yet",
                f"{age:.0f} of {now['T']} timesteps",
                f"{whole(life * age / now['T'])} iterations" if life else "–",
            ]
            rows.append((f"{run.label}, iteration {now['step']:,}", cells))
    columns = ["entries", "chains restarted", "a chain lives", "mean age, in timesteps", "mean age, about"]
    return Table("run", columns, rows)


def _by_run(material: Material, facts: Sequence[tuple[str, Callable[[Run], str]]]) -> Table:
    rows = [(name, [fact(run) for run in material.runs]) for name, fact in facts]
    told = [(name, cells) for name, cells in rows if any(cell != "–" for cell in cells)]
    return Table("", [run.label for run in material.runs], told)


def ending(run: Run) -> str:
    """How a run ended, in one line."""
    ended = _text(run.record.get("ended"))
    if ended == "not yet":
        return "not yet: it is running, or was killed"
    at = _text(run.record.get("ended_at")).replace("T", " ")
    return ended if at == "–" else f"{ended} ({at})"


def first(run: Run, name: str) -> float | None:
    """The first number in a column of progress.csv."""
    return next((row[name] for row in run.rows if name in row), None)


def last(run: Run, name: str) -> float | None:
    """The last number in a column of progress.csv."""
    return next((row[name] for row in reversed(run.rows) if name in row), None)


def _throughput(run: Run) -> str:
    step, seconds, rate = (last(run, name) for name in ("step", "seconds", "iterations_per_second"))
    images = last(run, "samples")
    begun = run.began_at
    if step and seconds and run.rows and run.rows[0]["step"] - begun < 0.5 * (step - begun):
        rate = (step - begun) / seconds
    if not rate:
        return "–"
    text = f"{rate:.4g} iterations/s"
    return f"{text}, {rate * images / step:.4g} images/s" if images and step else text


def _skipped(run: Run) -> str:
    """Each row holds the share of the iterations since the row before that were skipped."""
    total, before = 0.0, float(run.began_at)
    rows = [row for row in run.rows if "skipped" in row]
    for row in rows:
        total += row["skipped"] * (row["step"] - before)
        before = row["step"]
    return whole(total) if rows else "–"


def _best(run: Run) -> str:
    step, metric, value = (run.best.get(name) for name in ("step", "metric", "value"))
    if not isinstance(step, int) or not isinstance(value, int | float):
        return "–"
    return f"iteration {step:,}: {_text(metric)} {value:.4g}"


def _continued(run: Run) -> str:
    resumed = run.record.get("resumed")
    if not isinstance(resumed, list) or not resumed:
        return "–"
    times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
    return f"{times}, last {_text(resumed[-1]).replace('T', ' ')}"


def _version(run: Run, name: Any) -> str:
    versions = run.record.get("versions")
    return _text(versions.get(name)) if isinstance(versions, dict) else "–"


def _joined(value: Any, separator: str) -> str:
    return _text(separator.join(map(str, value)) if isinstance(value, list) else value)


def _text(value: Any) -> str:
    """A value from a file in one line; a dash for none."""
    text = re.sub(r"\s+", " ", str("–" if value is None or value == "" else value)).strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def number(value: float | None) -> str:
    """Four digits."""
    return "–" if value is None else f"{value:.4g}"


def whole(value: float | None) -> str:
    """A whole number with its thousands set apart."""
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Such as 1:02:03 h, 3:52 min or 5.1 s."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02} min"
    return f"{datetime.timedelta(seconds=min(round(seconds), _MOST_SECONDS))} h"
