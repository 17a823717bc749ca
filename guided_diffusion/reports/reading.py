"""Reads run directories, folders of samples and evaluator records, as far as they are sound."""

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.loading import read_plain
from ..config.settings import dotted
from ..errors import UserError, first_line
from ..io.files import read_object, short_names
from ..io.json_text import parse_json
from ..logger import read_pool_records, read_progress
from ..runs.checkpoint import manifest_step, read_manifest
from .material import Grid, Material, Picture, Run, Samples, Score

_MOST_BYTES = 16 << 20  # of a picture or a record
_MOST_GRIDS = 24  # of a run, in the page
_DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError, SyntaxError)


def read_material(paths: Sequence[Path], score_names: Sequence[str]) -> Material:
    """Read what the paths name: runs, folders of samples, evaluator records.

    Args:
        paths: in the order in which they are shown.
        score_names: the entries of a record that are scores.

    Raises:
        UserError: one of them is none of these, or there is no run.
    """
    runs, folders, records = [], [], []
    for path in dict.fromkeys(path.resolve() for path in paths):
        if (path / "progress.csv").is_file() or (path / "run.json").is_file():
            runs.append(_read_run(path))
        elif (path / "sampling.json").is_file():
            folders.append(path)
        elif path.is_file() and path.suffix == ".json":
            records += _read_records(path)
        else:
            what = "is no run" if path.exists() else "does not exist"
            raise UserError(
                f"{path}: {what}; give run directories (they hold progress.csv and run.json), folders of "
                "samples (sampling.json) and records of the evaluator (--output FILE.json)"
            )
    if not runs:
        raise UserError("no run among the paths; give at least one run directory")
    names = [run.name for run in runs]
    distinct = len(set(names)) == len(names)
    for run, label in zip(runs, names if distinct else short_names([str(r.path) for r in runs]), strict=True):
        run.label = label
    labels = short_names([record["samples"] for record in records])
    scores = [_score(*pair, score_names, runs) for pair in zip(labels, records, strict=True)]
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    samples = [
        _read_samples(path, label, notes)
        for path, label in zip(folders, short_names([str(path) for path in folders]), strict=True)
    ]
    return Material(runs, scores, samples, notes)


def _read_run(path: Path) -> Run:
    run = Run(path)
    run.record = _json_object(path / "run.json", run.notes, "how it ended and its versions are not known")
    try:
        rows = read_progress(path / "progress.csv")
        run.rows = [_finite(row) for row in rows if _is_number(row["step"])]
        _complete(run.rows, run.began_at)
        if not rows:
            raise ValueError("holds no whole row")
    except _DAMAGE as error:
        run.notes.append(f"progress.csv: {_reason(error)}; no curves")
    try:
        keys = dotted(read_plain(path / "config.yaml"))
        run.keys = {k: v if isinstance(v, str) else json.dumps(v, default=str) for k, v in keys.items()}
        if not run.keys:
            raise ValueError("holds nothing")
    except (UserError, *_DAMAGE) as error:
        run.notes.append(f"config.yaml: {_reason(error)}; no configuration")
    if (path / "pool.jsonl").is_file():
        try:
            records = read_pool_records(path / "pool.jsonl")
            run.pool = list({record["step"]: record for record in records if _is_pool(record)}.values())
            if not run.pool:
                raise ValueError("holds no whole line")
        except _DAMAGE as error:
            run.notes.append(f"pool.jsonl: {_reason(error)}; no levels of the pool")
    if (path / "best.json").is_file():
        run.best = _json_object(path / "best.json", run.notes, "the best checkpoint is not known")
    _read_grids(run)
    for manifest in path.glob("checkpoint*.json"):
        if (step := manifest_step(manifest.name)) is not None:
            try:
                files = read_manifest(path, step)
            except (OSError, ValueError) as error:
                run.notes.append(f"{manifest.name}: {_reason(error)}; scores of its weights stand alone")
                continue
            run.weights |= {str(file["sha256"]): step for file in files.values()}
    return run


def _complete(rows: Sequence[dict[str, float]], began_at: int) -> None:
    for before, row in itertools.pairwise(row for row in rows if "seconds" in row):
        if (spent := row["seconds"] - before["seconds"]) > 0:
            row["speed"] = (row["step"] - before["step"]) / spent
    for name, begins in (("samples", 0), ("seconds", began_at)):
        told = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip((begins, 0.0), *told, strict=True)
        for row in rows:
            if told and name not in row:
                row[name] = float(np.interp(row["step"], steps, values))


def _read_grids(run: Run) -> None:
    """The run's grids; of many, some that are evenly spaced, with the first and the last."""
    digits = {path.stem.removeprefix("samples") for path in run.path.glob("samples*.png")}
    steps = sorted((int(d), d) for d in digits if d.isascii() and d.isdigit())
    if len(steps) > _MOST_GRIDS:
        chosen = {round(i * (len(steps) - 1) / (_MOST_GRIDS - 1)) for i in range(_MOST_GRIDS)}
        run.notes.append(f"{_MOST_GRIDS} of its {len(steps)} grids of samples are shown")
        steps = [steps[i] for i in sorted(chosen)]
    for step, written in steps:
        ema = _picture(run.path / f"samples{written}.png", run.notes)
        raw = _picture(run.path / f"samples_raw{written}.png", run.notes)
        if ema or raw:
            run.grids.append(Grid(step, ema, raw))
    run.teacher = _picture(run.path / "samples_teacher.png", run.notes)


def _read_samples(path: Path, label: str, notes: list[str]) -> Samples:
    facts = _json_object(path / "sampling.json", notes, "how they were drawn is not known", str(path))
    return Samples(label, _picture(path / "samples.png", notes, str(path)), facts)


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The evaluator's records in a file.

    Raises:
        UserError: it holds something else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
        records = parse_json(path.read_bytes())
        sound = isinstance(records, list) and records and all(_is_record(record) for record in records)
    except _DAMAGE as error:
        raise UserError(f"{path}: not readable as JSON ({_reason(error)})") from None
    if not sound:
        raise UserError(
            f"{path}: is no record of the evaluator (evaluator.py --output {path.name} writes one)"
        )
    return records


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("samples"), str) and "backend" in record


def _score(label: str, record: Mapping[str, Any], names: Sequence[str], runs: Sequence[Run]) -> Score:
    told = record.get("samples_provenance")
    told = told if isinstance(told, dict) else {}
    sha256 = str(told.get("model_sha256"))
    run = next((i for i, run in enumerate(runs) if sha256 in run.weights), None)
    given = record.get("intervals")
    intervals = {
        name: (float(pair[0]), float(pair[1]))
        for name, pair in (given if isinstance(given, dict) else {}).items()
        if isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair))
    }
    return Score(
        label=label,
        n=record["n"] if isinstance(record.get("n"), int) else 0,
        backend=str(record["backend"])[:40],
        values={name: float(record[name]) for name in names if _is_number(record.get(name))},
        intervals=intervals,
        run=run,
        step=None if run is None else runs[run].weights[sha256],
    )


def _picture(path: Path, notes: list[str], where: str = "") -> Picture | None:
    """A picture that is there and whole; None without."""
    if not path.is_file():
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            return Picture(f"data:image/png;base64,{base64.b64encode(content).decode()}", *image.size)
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        # Pillow's own words name the object in memory that it was given.
        reason = "is no PNG" if isinstance(error, UnidentifiedImageError) else _reason(error)
        notes.append(f"{where and f'{where}: '}{path.name}: {reason}; not shown")
        return None


def _json_object(path: Path, notes: list[str], lost: str, where: str = "") -> dict[str, Any]:
    try:
        return read_object(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        notes.append(f"{where and f'{where}: '}{path.name}: {_reason(error)}; {lost}")
        return {}


def _is_pool(record: Mapping[str, Any]) -> bool:
    counts = [record.get("T"), record.get("clean"), record.get("restarts")]
    levels = record.get("levels")
    if not isinstance(levels, list) or not levels or not _is_number(record.get("mean_level")):
        return False
    return all(isinstance(n, int) and 0 <= n < 1 << 53 for n in [*counts, *levels]) and record["T"] > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if _is_number(value)}


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return first_line(error)[:200]
