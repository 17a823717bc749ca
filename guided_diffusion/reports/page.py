"""The report of runs: one HTML page that needs nothing else, neither a network nor a server."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.files import write_text
from . import tables
from .charts import AXES, Canvas, Line, dashes
from .material import Material, Run

_HERE = Path(__file__).parent
_QUARTILES = ["cleanest quarter", "second quarter", "third quarter", "noisiest quarter"]
_MEANINGS = {
    "loss": "what is minimised: all terms with their weights",
    "mse": "squared error of the predicted noise",
    "vb": "variational bound, for the variances",
    "align": "contrastive loss",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "skipped": "share of iterations skipped: gradients not finite",
    "loss_scale": "loss scale of float16",
    "speed": "iterations per second, row by row",
}


@dataclass(frozen=True)
class Panel:
    """A chart with its words.

    Attributes:
        title: what it shows.
        about: the title's meaning; may be empty.
        says: the chart in words, for who cannot see it.
        charts: <svg>, by the horizontal axis; "" for one that has no choice.
    """

    title: str
    about: str
    says: str
    charts: Mapping[str, str]


def write_report(path: Path, material: Material, score_names: Mapping[str, str]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        material: what it shows.
        score_names: how scores are called, by their names in the evaluator's records.
    """
    page = render(material, score_names)
    write_text(path, page.encode(errors="replace").decode())  # files may hold halves of characters


def render(material: Material, score_names: Mapping[str, str]) -> str:
    """The page as text; see `write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Whatever comes from files is escaped by the template; our charts, style and script are marked as safe.
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    columns = dict.fromkeys(name for run in material.runs for row in run.rows for name in row)
    terms = [name for name in columns if any(f"{name}_q{q}" in columns for q in range(4))]
    axes = {name: title for name, title in AXES.items() if name in columns or name == "step"}
    canvas, small = Canvas(), Canvas(240, 150)
    script = (_HERE / "page.js").read_text()
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=", ".join(dict.fromkeys(run.name for run in material.runs)),
        material=material,
        axes=axes,
        ending=tables.ending,
        dashes=dashes,
        style=(_HERE / "page.css").read_text(),
        script=script,
        script_checksum=checksum,
        terms=[
            _column(canvas, material, axes, name)
            for name in [*terms, *(["loss"] if "loss" in columns else [])]
        ],
        quartiles=[(name, _quartiles(small, material, axes, name)) for name in terms],
        course=_course(canvas, material, axes, columns),
        scores=_scores(canvas, material, axes, score_names),
        pools=[panel for run in material.runs if (panel := _pool(canvas, material, run))],
        overview=tables.overview(material),
        losses=tables.losses(material, terms),
        score_table=tables.scores(material, score_names),
        pool_table=tables.pools(material),
        differences=tables.differences(material),
        provenance=tables.provenance(material),
        sample_facts=_sample_facts,
    )


def _points(run: Run, axis: str, column: str) -> tuple[list[float], list[float]]:
    pairs = [(row[axis], row[column]) for row in run.rows if axis in row and column in row]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _column(canvas: Canvas, material: Material, axes: Mapping[str, str], name: str, title: str = "") -> Panel:
    """A column of progress.csv over each axis; called by its name, unless a title is given."""
    about = "" if title else _MEANINGS.get(name) or _MEANINGS.get(name.rpartition("_")[2], "")
    lines = {
        axis: [Line(i, *_points(run, axis, name)) for i, run in enumerate(material.runs)] for axis in axes
    }
    says = []
    for line in lines["step"]:
        if line.ys:
            ends = f"{line.ys[0]:.4g} at iteration {line.xs[0]:.0f}, {line.ys[-1]:.4g} at {line.xs[-1]:.0f}"
            says.append(f"{material.runs[line.run].label}: {ends}")
    charts = {axis: canvas.lines(of_axis, axis) for axis, of_axis in lines.items()}
    return Panel(title or name, about, f"{name}{title and f', {title}'}. {'; '.join(says)}", charts)


def _quartiles(canvas: Canvas, material: Material, axes: Mapping[str, str], term: str) -> list[Panel]:
    return [_column(canvas, material, axes, f"{term}_q{q}", title) for q, title in enumerate(_QUARTILES)]


def _course(
    canvas: Canvas, material: Material, axes: Mapping[str, str], columns: Mapping[str, Any]
) -> list[Panel]:
    """How the training itself went."""
    names = [name for name in ("grad_norm", "lr", "loss_scale") if name in columns]
    if any(row.get("skipped") for run in material.runs for row in run.rows):
        names.append("skipped")
    panels = [_column(canvas, material, axes, name) for name in names]
    if "speed" in columns:
        panels.append(_column(canvas, material, axes, "speed"))
    return panels


def _scores(
    canvas: Canvas,
    material: Material,
    axes: Mapping[str, str],
    names: Mapping[str, str],
) -> list[Panel]:
    """Scores while training, and those of records whose samples a run's weights drew."""
    panels = []
    for name, title in names.items():
        charts, says, points = {}, [], 0
        for axis in axes:
            lines = [
                Line(i, *_points(run, axis, _eval_column(run, name))) for i, run in enumerate(material.runs)
            ]
            recorded = [_recorded(material, i, name, axis) for i in range(len(material.runs))]
            lines += [line for line in recorded if line.xs]
            charts[axis] = canvas.lines(lines, axis)
            if axis == "step":
                points = max(len(line.xs) for line in lines)
                for line in lines:
                    pairs = [f"{y:.4g} at iteration {x:.0f}" for x, y in zip(line.xs, line.ys, strict=True)]
                    if pairs:
                        says.append(f"{material.runs[line.run].label}: {', '.join(pairs[-5:])}")
        if points > 1:
            panels.append(Panel(title, _counted(material, name), f"{title}. {'; '.join(says)}", charts))
    return panels


def _eval_column(run: Run, name: str) -> str:
    """The column of a score; the digits' and the Inception networks' distances share one."""
    distance = "fd" if run.keys.get("run.eval_backend", "digits") == "digits" else "fid"
    return "eval_fd" if name == distance else f"eval_{name}" if name not in ("fd", "fid") else ""


def _recorded(material: Material, run: int, name: str, axis: str) -> Line:
    """The evaluator's records of a run's weights; on the other axes at the row of their step."""
    found = []
    for score in material.scores:
        if score.run != run or score.step is None or name not in score.values:
            continue
        rows = [row for row in material.runs[run].rows if row["step"] <= score.step and axis in row]
        if axis == "step" or rows:
            x = float(score.step) if axis == "step" else rows[-1][axis]
            value = score.values[name]
            found.append((x, value, score.intervals.get(name, (value, value))))
    xs, ys, errors = zip(*sorted(found), strict=True) if found else ((), (), ())
    return Line(run, xs, ys, errors)


def _counted(material: Material, name: str) -> str:
    """Of how many images; scores of different numbers are not comparable."""
    during = {
        run.keys["run.eval_samples"]
        for run in material.runs
        if "run.eval_samples" in run.keys and any(_eval_column(run, name) in row for row in run.rows)
    }
    after = {str(s.n) for s in material.scores if s.run is not None and name in s.values}
    parts = []
    if during:
        parts.append(f"while training, of {' or '.join(sorted(during))} images")
    if after:
        parts.append(f"{'marks: ' if during else ''}records, of {' or '.join(sorted(after))} images")
    if len(during | after) > 1:
        parts.append("different numbers of images are not comparable")
    return "; ".join(parts)


def _pool(canvas: Canvas, material: Material, run: Run) -> Panel | None:
    if not run.pool:
        return None
    start, now = run.pool[0], run.pool[-1]
    begun = start["levels"] if start["step"] == 0 and start is not now else None
    entries = sum(now["levels"]) + now["clean"]
    bins = len(now["levels"])
    quarters = [sum(now["levels"][q * bins // 4 : (q + 1) * bins // 4]) for q in range(4)]
    about = f"{entries:,} entries at iteration {now['step']:,}" + (
        ", and at the start (grey)" if begun else ""
    )
    says = f"{run.label}: {about}; by quarters from clean to noise now {', '.join(map(str, quarters))}"
    svg = canvas.histogram(begun, now["levels"], now["T"], material.runs.index(run))
    return Panel(run.label, about, says, {"": svg})


def _sample_facts(facts: Mapping[str, Any]) -> str:
    """How a set was drawn, in one line."""
    names: Sequence[str] = ("config", "model", "step", "sampler", "steps", "seed")
    return ", ".join(
        f"{n} {str(facts[n])[:80]}" for n in names if isinstance(facts.get(n), str | int | float)
    )
