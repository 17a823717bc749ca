"""The report of a study: a page of tables and plots, made from its results."""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..io.files import atomic_path, write_text
from ..runs.figures import save_figure
from .cells import cells_of
from .ledger import chains_seen
from .results import Results, primary_name
from .statistics import PairedDifference, holm, paired_difference
from .study_file import Budget, Study, StudyRun

_NAMES = {
    **{"fd": "digits-FD", "fid": "FID", "to_teacher": "to the teacher"},
    **{"sfid": "sFID", "precision": "precision", "recall": "recall"},
}
_HOW_TO_READ = """Lower is better in every column but precision and recall. Seeds are paired: with one seed
all runs have the same initial weights, pool, order and sampling noise, as far as their configurations
allow. A difference is the mean over the seeds that both runs have, with its 95 % interval (Student's t); n
stands beside it where these are not all of the run's. p is the exact two-sided sign-flip test's, which
cannot be below 2^(1-n) for n seeds; p (Holm) is corrected for the number of comparisons in its table. Above
the teacher: the difference to the teacher's own score, which has the same noise, seed by seed. To the
teacher: the same score against the teacher's samples of the same noise instead of real images. Held-out
error: the mean squared difference of the noise predictions of student and teacher on states of the
teacher's full chain. On-policy error: the same at the states of the student's own chain. Path KL: the sum
over that chain's steps of KL(student's step ‖ teacher's step), in nats an image. Chains: about how many of
the teacher's different chains the student was shown. Wall time and FLOPs are of preparation and training
together: FLOPs are counted ({how}), wall times depend on the machine and on what ran beside, both of
which stand at the end."""


_QUESTIONS = """Each is answered by pairs of runs that have the seed in common. Lower is better, so a
difference below 0 speaks for the first of the two. The interval is Student's t, 95 %; p is the exact
two-sided sign-flip test's, and p (Holm) is corrected for all lines of this table."""
_UNITS = {"iterations": (1, "iterations"), "flops": (1e12, "TFLOP"), "seconds": (1, "seconds")}


@dataclass(frozen=True)
class Row:
    """A run with a budget: its records, by seed.

    Attributes:
        chains: about how many of the teacher's chains the student was shown; None if it did not distil.
    """

    run: StudyRun
    budget: Budget
    records: Mapping[int, dict[str, Any]]
    chains: float | None = None

    @property
    def done(self) -> dict[int, dict[str, Any]]:
        """The records of those that did not diverge, by seed."""
        return {seed: record for seed, record in self.records.items() if "failed" not in record}

    def final(self, key: str) -> dict[int, float]:
        """A score at the end of the budget, by seed, where there is one."""
        found = {seed: _at(record["scores"][-1], key) for seed, record in self.done.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, key: str) -> float | None:
        """Of `final`; None without."""
        return _mean(self.final(key).values())


def write_report(study: Study, results: Results, out: Path, path: Path, how: str) -> None:
    """Write a study's page, and its pictures into the folder of the same name beside it.

    Args:
        study: the study.
        results: its results.
        out: where it was run; pictures of samples are taken from there if they are there.
        path: the page, Markdown.
        how: where the counting is explained, Markdown.
    """
    known = results.read()
    rows = _rows(study, known)
    teacher = _teacher(rows)
    pictures = path.with_suffix("")
    title = f"# Study: {study.name}\n\n{study.about[:1].upper()}{study.about[1:]}\n" if study.about else ""
    parts = [title or f"# Study: {study.name}\n"]
    parts.append(
        f"*Written by `python scripts/study.py {_short(study.path)}` from its results: edit neither.*\n"
    )
    if study.findings:
        parts.append(f"## Findings\n\n{study.findings.strip()}\n")
    if study.questions:
        parts.append(f"## Questions\n\n{_QUESTIONS}\n\n{_questions_table(study, rows)}")
    parts.append(f"## How to read it\n\n{_HOW_TO_READ.replace('{how}', how)}\n")
    told = "The mean score with each budget and, in brackets, of how many seeds."
    parts.append(f"## All runs\n\n{told}\n\n{_overview(study, rows, teacher)}")
    for budget in study.budgets.values():
        of_budget = [row for row in rows if row.budget == budget]
        by_name = {row.run.name: row for row in of_budget}
        scale, unit = _UNITS[budget.kind]
        parts.append(f"## {budget.name}: {budget.amount / scale:,.10g} {unit}\n")
        parts += _all_runs(study, of_budget, teacher, pictures)
        parts += _why(study, of_budget, pictures)
        for number, group in enumerate(dict.fromkeys(row.run.group for row in of_budget)):
            own = by_name.get(study.baselines.get(group, study.baseline))
            baseline = own if own and own.records else by_name.get(study.baseline)  # where it was not run
            shown = [row for row in of_budget if row is baseline or row.run.group == group]
            shown = [row for row in shown if row.records]
            if not any(row.run.group == group for row in shown):
                continue
            if group:
                parts.append(f"### {group[:1].upper()}{group[1:]}\n")
            parts.append(_scores_table(shown, baseline, teacher))
            if any(row.final("held_out.all") for row in shown):
                what = "Errors by quarters of the chain, from the cleanest states to the noisiest"
                parts.append(_folded(what, _quarters_table(shown)))
            if any(row.final("primary") for row in shown):  # not if all scores are null
                image = pictures / f"{study.name}-{budget.name}-{number}.png"
                _plot(image, shown)
                parts.append(f"![Scores over cost]({pictures.name}/{image.name})\n")
            found = {row.run.name: _samples(study, row, out, pictures) for row in shown}
            samples = [[name, f"![{name}]({pictures.name}/{i.name})"] for name, i in found.items() if i]
            if samples:
                what = "What each makes of the same sixteen noises (the first seed's)"
                parts.append(_folded(what, _table(["run", "samples"], samples)))
        if missing := [row.run.name for row in of_budget if not row.records]:
            parts.append(f"Not run yet with this budget: {', '.join(missing)}.\n")
    parts.append(_description(study, rows))
    if others := _others(rows, known):
        parts.append(f"Results of cells that the study does not declare (any more): {others}.\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(parts))


def _overview(study: Study, rows: list[Row], teacher: Row | None) -> str:
    """Every run that has a score: its mean with each budget, and its differences to baseline and teacher."""
    own = {(row.run.name, row.budget.name): row for row in rows if row.done}
    used = [budget for budget in study.budgets if any((name, budget) in own for name in study.runs)]
    lines = []
    for name in study.runs:
        line = [name]
        for budget in used:
            row, baseline = own.get((name, budget)), own.get((study.baseline, budget))
            line += [f"{_number(row.mean('primary'))} ({len(row.final('primary'))})" if row else ""]
            compared = row is not None and row is not baseline and not row.run.teacher
            line += [_interval(_difference(row, baseline), row) if row and compared else ""]
            if teacher:
                line += [_interval(_above(row, teacher), row) if row and not row.run.teacher else ""]
        if any(line[1:]):
            lines.append(line)
    head = []
    for budget in used:
        head += [budget, f"{budget}: difference to {study.baseline}"]
        head += [f"{budget}: above the teacher"] if teacher else []
    return _table(["run", *head], lines)


def _questions_table(study: Study, rows: list[Row]) -> str:
    """The study's questions: for each, and each of its budgets that both runs have results of, a line."""
    own = {(row.run.name, row.budget.name): row for row in rows}
    found = []
    for question in study.questions:
        for budget in question.budgets:
            row, other = (own.get((name, budget)) for name in (question.run, question.against))
            difference = _difference(row, other) if row else None
            if row and other and difference:
                found.append((question, row, other, difference))
    corrected = holm([difference.p for *_, difference in found])
    lines: list[list[str]] = []
    asked = ""
    for (question, row, other, difference), p in zip(found, corrected, strict=True):
        ours, theirs = row.final("primary"), other.final("primary")
        pairs = ours.keys() & theirs.keys()
        means = [_number(_mean(scores[seed] for seed in pairs)) for scores in (ours, theirs)]
        better = sum(ours[seed] < theirs[seed] for seed in pairs)
        ask = "" if question.ask == asked else question.ask[:1].upper() + question.ask[1:]
        lines.append([ask, f"{row.run.name} − {other.run.name}", row.budget.name, " against ".join(means)])
        lines[-1] += [_interval(difference), f"{better} of {difference.n}", _p(difference.p), _p(p)]
        asked = question.ask
    head = ["question", "difference of", "budget", "means", "difference", "better in", "p", "p (Holm)"]
    return _table(head, lines)


def _all_runs(study: Study, rows: list[Row], teacher: Row | None, pictures: Path) -> list[str]:
    """A picture of every run's scores with one budget, the best first."""
    shown = [row for row in rows if row.final("primary") and not row.run.teacher]
    if len(shown) < 2:
        return []
    image = pictures / f"{study.name}-{rows[0].budget.name}-all.png"
    _plot_all(image, shown, teacher)
    told = "Every run, the best mean first: a dot for each seed, a bar at the mean"
    told += ", a line at the teacher's.\n" if teacher and teacher.final("primary") else ".\n"
    return [told, f"![Every run's scores]({pictures.name}/{image.name})\n"]


def _why(study: Study, rows: list[Row], pictures: Path) -> list[str]:
    """Two pictures of all that distilled: chains seen against the score, and where a student's chain errs."""
    shown = [row for row in rows if row.chains and row.final("primary")]
    if len(shown) < 2:
        return []
    image = pictures / f"{study.name}-{rows[0].budget.name}-why.png"
    _plot_why(image, shown)
    return [
        "About how many different chains of the teacher's a student was shown, against its score; and where "
        "its own chain leaves the teacher's: KL(student's step ‖ teacher's step) at each step, if known.\n",
        f"![Chains seen, and divergence along the chain]({pictures.name}/{image.name})\n",
    ]


def _rows(study: Study, known: Mapping[str, dict[str, Any]]) -> list[Row]:
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for cell in cells_of(study):
        records = found.setdefault((cell.run.name, cell.budget.name), {})
        if cell.id in known:
            records[cell.seed] = known[cell.id]
    return [
        Row(study.runs[run], study.budgets[budget], records, _chains(study, study.runs[run], records))
        for (run, budget), records in found.items()
    ]


def _chains(study: Study, run: StudyRun, records: Mapping[int, dict[str, Any]]) -> float | None:
    if run.teacher or run.data or not records:
        return None
    return chains_seen(study.experiment(run), next(iter(records.values()))["iterations"])


def _scores_table(rows: list[Row], baseline: Row | None, teacher: Row | None) -> str:
    compared = {
        row.run.name: difference
        for row in rows
        if row is not baseline and not row.run.teacher and (difference := _difference(row, baseline))
    }
    corrected = dict(zip(compared, holm([found.p for found in compared.values()]), strict=True))
    primary = next((primary_name(record["scores"][-1]) for row in rows for record in row.done.values()), "fd")
    more = [
        name for name in ("to_teacher", "sfid", "precision", "recall") if any(row.final(name) for row in rows)
    ]
    head = ["run", _NAMES[primary], "each seed", f"difference to {baseline.run.name if baseline else '-'}"]
    head += ["p", "p (Holm)", *(["above the teacher"] if teacher else [])]
    for name in more:
        head += [_NAMES[name], "difference"] if name == "to_teacher" else [_NAMES[name]]
    head += ["held-out error", "on-policy error", "path KL", "chains"]
    head += ["iterations", "wall time", "TFLOPs"]
    lines = []
    for row in rows:
        seeds = [
            "diverged" if "failed" in record else _number(record["scores"][-1]["primary"])
            for _, record in sorted(row.records.items())
        ]
        difference = compared.get(row.run.name)
        line = [row.run.name, _number(row.mean("primary")), " / ".join(seeds)]
        line += [
            _interval(difference, row),
            _p(difference.p if difference else None),
            _p(corrected.get(row.run.name)),
        ]
        if teacher:
            line += [_interval(_above(row, teacher), row)]
        for name in more:
            line += [_mean_of_some(row, name)]
            if name == "to_teacher":
                line += [_interval(_difference(row, baseline, name) if row is not baseline else None, row)]
        line += [_number(row.mean(name)) for name in ("held_out.all", "on_policy.all", "path_kl")]
        line += ["-" if row.chains is None else f"{row.chains:,.0f}"]
        line += [_cost(row, lambda record: record["iterations"], "{:,.0f}"), _cost(row, _wall, "{:,.0f} s")]
        lines.append([*line, _cost(row, lambda record: record["flops"]["total"] / 1e12, "{:.3g}")])
    return _table(head, lines)


def _quarters_table(rows: list[Row]) -> str:
    kinds = {"held_out": "held-out", "on_policy": "on-policy"}
    head = ["run", *(f"{kinds[kind]}, {q + 1}" for kind in kinds for q in range(4))]
    lines = [
        [row.run.name, *(_number(row.mean(f"{kind}.quarters.{q}")) for kind in kinds for q in range(4))]
        for row in rows
        if row.final("held_out.all") or row.final("on_policy.all")
    ]
    return _table(head, lines)


def _difference(row: Row, baseline: Row | None, key: str = "primary") -> PairedDifference | None:
    ours, theirs = row.final(key), baseline.final(key) if baseline else {}
    both = sorted(ours.keys() & theirs.keys())
    return paired_difference([ours[seed] - theirs[seed] for seed in both]) if both else None


def _teacher(rows: list[Row]) -> Row | None:
    """The run of the teacher itself that has most seeds: its score depends on no budget."""
    known = [row for row in rows if row.run.teacher and row.done]
    return max(known, key=lambda row: len(row.done), default=None)


def _above(row: Row, teacher: Row) -> PairedDifference | None:
    return None if row.run.teacher else _difference(row, teacher)


def _description(study: Study, rows: list[Row]) -> str:
    """What the runs are, where they were run, and what is not there."""
    common = _last(study.overrides)
    lines = []
    for run in study.runs.values():
        own = [f"`{key}={value}`" for key, value in _last(run.overrides).items() if common.get(key) != value]
        if run.data is not None:
            own.append(f"trained on images, {run.data.real:.0%} of them real, the others by the teacher")
        seeds = [f"{name}: {', '.join(map(str, study.seeds(run, name)))}" for name in run.budgets]
        lines.append([run.name, run.about, ", ".join(own), "; ".join(seeds)])
    parts = ["## What was run\n", f"Configuration: `{_short(study.config)}`; for all runs "]
    parts[-1] += (
        ", ".join(f"`{key}={value}`" for key, value in common.items()) + ".\n" if common else "as it is.\n"
    )
    parts.append(_table(["run", "what it is", "differs by", "seeds by budget"], lines))
    metrics = study.metrics
    parts.append(
        f"Scores: {metrics.sets} set(s) of {metrics.samples:,} samples in {metrics.respacing} steps, with "
        f"averaged weights; {metrics.held_out} held-out states; {metrics.chains} chains of the student's "
        f"own, of {metrics.respacing} steps too. Reference: {study.reference}; features: {study.backend}.\n"
    )
    records = [record for row in rows for record in row.records.values()]
    missing = sum(seed not in row.records for row in rows for seed in study.seeds(row.run, row.budget.name))
    machines = {
        f"{m['gpu'] or m['cpu']}, {m['cores']} cores, {m['threads']} thread(s) a run, {m['jobs']} run(s) "
        f"at a time, torch {m['torch']}"
        for record in records
        for m in [record["machine"]]
    }
    revisions = sorted({re.sub(r"(\w{12})\w*", r"\1", str(record["revision"])) for record in records})
    parts.append(
        f"{len(records)} results; {missing} not run yet. Machines: {'; '.join(sorted(machines)) or '-'}. "
    )
    parts[-1] += f"Revisions: {', '.join(revisions) or '-'}.\n"
    failed = [
        f"- {row.run.name}/{row.budget.name}, seed {seed}: {record['failed']}"
        for row in rows
        for seed, record in row.records.items()
        if "failed" in record
    ]
    return "\n".join(parts + (["Diverged:\n", *failed, ""] if failed else []))


def _others(rows: list[Row], known: Mapping[str, dict[str, Any]]) -> str:
    """Results that stand in no table, lest they be passed over."""
    shown = {record["id"] for row in rows for record in row.records.values()}
    found = [record for key, record in known.items() if key not in shown and record["scores"]]
    return "; ".join(
        f"{record['run']}/{record['budget']}/{record['seed']} {_number(record['scores'][-1]['primary'])}"
        for record in found
    )


def _last(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides by key: the last of a key is what counts."""
    return dict(override.partition("=")[::2] for override in overrides)


def _samples(study: Study, row: Row, out: Path, pictures: Path) -> Path | None:
    """The picture of a run's samples beside the page, brought from where it was run; None without."""
    if not row.done:
        return None
    record = row.done[min(row.done)]
    path = pictures / f"{study.name}-{row.budget.name}-{row.run.name}.png"
    for own in (out / "cells").glob(f"*-{record['id'][:8]}/pictures.png"):
        pictures.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            shutil.copyfile(own, temporary)
    return path if path.is_file() else None


def _plot(path: Path, rows: list[Row]) -> None:
    """Draw the score over iterations, wall time and FLOPs: a line a run, a dot a seed."""
    from matplotlib.figure import Figure

    costs: dict[str, Callable[[dict[str, Any], float], float]] = {
        "iterations": lambda record, at: at * record["iterations"],
        "wall time, seconds": _wall,
        "TFLOPs": lambda record, at: _flops(record, at) / 1e12,
    }
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (label, cost) in zip(figure.subplots(1, 3, sharey=True), costs.items(), strict=True):
        for number, row in enumerate(row for row in rows if row.done):
            records = list(row.done.values())
            if row.run.teacher:
                axes.axhline(row.mean("primary") or 0, color="k", linewidth=0.8, label=row.run.name)
                continue
            x = [[cost(record, score["fraction"]) for score in record["scores"]] for record in records]
            y = np.array([[score["primary"] for score in r["scores"]] for r in records], dtype=float)
            look: dict[str, Any] = {
                "color": f"C{number % 10}",
                "linestyle": ["-", "--", ":"][number // 10 % 3],
            }
            axes.plot(np.mean(x, axis=0), np.mean(y, axis=0), marker="o", ms=4, label=row.run.name, **look)
            axes.plot(np.ravel(x), np.ravel(y), ".", color=look["color"], alpha=0.35, ms=4)
        axes.set(xlabel=label, yscale="log")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, which="both")
    primary = next(primary_name(record["scores"][-1]) for row in rows for record in row.done.values())
    figure.axes[0].set_ylabel(_NAMES[primary])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    save_figure(path, figure, dpi=80)


def _plot_all(path: Path, rows: list[Row], teacher: Row | None) -> None:
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda row: row.mean("primary") or 0, reverse=True)
    figure = Figure(figsize=(10, 0.8 + 0.19 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(row.run.group for row in rows))
    for y, row in enumerate(ordered):
        scores = list(row.final("primary").values())
        color = f"C{groups.index(row.run.group) % 10}"
        axes.plot(scores, [y] * len(scores), "o", color=color, ms=4, alpha=0.7)
        axes.plot(row.mean("primary") or 0, y, "|", color=color, ms=10, mew=2)
    if teacher and teacher.final("primary"):
        axes.axvline(teacher.mean("primary") or 0, color="k", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [row.run.name for row in ordered], fontsize=8)
    axes.set(xscale="log", ylim=(-0.7, len(ordered) - 0.3))
    axes.set_xlabel(_NAMES[next(primary_name(record["scores"][-1]) for record in ordered[0].done.values())])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both", axis="x")
    save_figure(path, figure, dpi=80)


def _plot_why(path: Path, rows: list[Row]) -> None:
    from matplotlib.figure import Figure

    recorded = any("step_kl" in r["scores"][-1] for row in rows for r in row.done.values())
    columns = 4 if recorded else 2
    height = 4.6 + 0.2 * -(-len(rows) // columns)  # of the plots and of the names below them
    figure = Figure(figsize=(13 if recorded else 8, height), layout="constrained")
    chains, *others = figure.subplots(1, 1 + recorded, squeeze=False)[0]
    for number, row in enumerate(rows):
        look = {"color": f"C{number % 10}", "marker": "osD^v"[number // 10 % 5]}
        scores = list(row.final("primary").values())
        chains.plot([row.chains or 0] * len(scores), scores, linestyle="", label=row.run.name, **look)
        divergences = [r["scores"][-1].get("step_kl") for r in row.done.values()]
        if found := [divergence for divergence in divergences if divergence]:
            mean = np.mean(np.array(found, dtype=float), axis=0)  # null: not finite
            t = (np.arange(len(mean)) + 0.5) / len(mean)
            others[0].plot(t, mean, color=look["color"], linestyle=["-", "--", ":"][number // 10 % 3])
    chains.set(xscale="log", yscale="log", xlabel="chains seen", ylabel="score")
    for axes in others:
        axes.set(yscale="log", xlabel="t / T (0: clean, 1: noise)", ylabel="KL of the step, nats an image")
    for axes in (chains, *others):
        axes.grid(alpha=0.25, which="both")
    names = chains.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    save_figure(path, figure, dpi=80)


def _wall(record: dict[str, Any], at: float = 1.0) -> float:
    return record["seconds"]["preparation"] + at * record["seconds"]["train"]


def _flops(record: dict[str, Any], at: float = 1.0) -> float:
    return record["flops"]["preparation"] + at * (record["flops"]["total"] - record["flops"]["preparation"])


def _cost(row: Row, of: Callable[[dict[str, Any]], float], form: str) -> str:
    mean = _mean(of(record) for record in row.records.values())
    return "-" if mean is None else form.format(mean)


def _at(score: Any, key: str) -> float | None:
    """What "held_out.quarters.0" means in a score."""
    for name in key.split("."):
        score = score[int(name)] if isinstance(score, list) else (score or {}).get(name)
    return score


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _mean_of_some(row: Row, key: str) -> str:
    """The mean of a score, and of how many seeds where it is not of all."""
    known = len(row.final(key))
    return _number(row.mean(key)) + (f" (n = {known})" if 0 < known < len(row.done) else "")


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(difference: PairedDifference | None, row: Row | None = None) -> str:
    """A difference, with its interval; of a row's, of how many pairs where that is not all of its seeds."""
    if difference is None:
        return "-"
    pairs = f" (n = {difference.n})" if row and difference.n < len(row.done) else ""
    if math.isinf(difference.low):
        return f"{difference.mean:+.3g}{pairs}"
    return f"{difference.mean:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]{pairs}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _folded(summary: str, content: str) -> str:
    """What a page shows when it is asked to: Markdown, here and on GitHub."""
    return f"<details markdown><summary>{summary}</summary>\n\n{content}\n</details>\n"


def _short(path: Path) -> str:
    """From the project's yaml folder on."""
    parts = path.parts
    return "/".join(parts[parts.index("yaml") :]) if "yaml" in parts else path.name
