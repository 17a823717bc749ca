"""Charts as SVG that becomes part of a page: drawn by matplotlib, coloured by the page's CSS variables.

matplotlib knows no CSS, so it draws in stand-ins, colours that nobody would choose, which are replaced in the
text that it writes. Text stays text, in the page's font. No string from a file is drawn.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

# The horizontal axes that the page lets one choose from, by the column of progress.csv.
AXES = {"step": "iterations", "samples": "images seen", "seconds": "training time"}
COLOURS = 8  # of runs; the page's CSS has as many
_DASHES: list[Any] = ["solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2))]
_INK, _RULE, _START = "#0a0b01", "#0a0b02", "#0a0b03"
_STAND_INS = {_INK: "var(--muted)", _RULE: "var(--rule)", _START: "var(--start)"}
_MOST_POINTS = 300
_UNITS = [(1, "s"), (60, "min"), (3600, "h"), (86400, "d")]
_NAMESPACE = "http://www.w3.org/2000/svg"
_salts = itertools.count()
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Line:
    """What one run contributes to a chart.

    Attributes:
        run: its number, which gives colour and dashes.
        xs, ys: the points.
        errors: each point's interval, or None; such points are drawn as marks, without a line.
    """

    run: int
    xs: Sequence[float]
    ys: Sequence[float]
    errors: Sequence[tuple[float, float]] | None = None


def _style_of(run: int) -> Any:
    """A run's dashes; runs of one colour differ in them."""
    return _DASHES[(run + run // COLOURS) % len(_DASHES)]


def colour(run: int) -> str:
    """The stand-in of a run's colour."""
    return f"#0a0c{run % COLOURS:02x}"


def dashes(run: int) -> str:
    """A run's dashes as SVG has them, for the legend."""
    style = _style_of(run)
    return "" if isinstance(style, str) else " ".join(str(1.6 * length) for length in style[1])


class Canvas:
    """Draws one chart after the other, all of one size; making its parts anew would take twice as long.

    Args:
        wide, height: in pixels, of the page at its usual width.
    """

    def __init__(self, wide: int = 320, height: int = 190):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(_STYLE):
            self._figure = Figure(figsize=(wide / 72, height / 72))
            self._axes = self._figure.add_axes((48 / wide, 40 / height, 1 - 60 / wide, 1 - 50 / height))
            self._axes.set_axisbelow(True)

    def lines(self, lines: Sequence[Line], axis: str) -> str:
        """Lines over one of `AXES`, as <svg>; logarithmic where all is positive and spans a factor of three.

        Args:
            lines: of runs.
            axis: the name of the column that their xs are of.
        """
        scale, unit = 1.0, AXES[axis]
        if axis == "seconds":
            longest = max((max(line.xs) for line in lines if len(line.xs)), default=0.0)
            scale, name = max((u for u in _UNITS if u[0] * 2 <= longest), default=_UNITS[0])
            unit = f"{unit} ({name})"
        axes = self._empty()
        for line in lines:
            if line.errors is None:
                xs, ys = _thinned(line.xs, line.ys)
                style: dict[str, Any] = {"linestyle": _style_of(line.run)}
                if len(xs) == 1:
                    style = {"linestyle": "none", "marker": "o", "markersize": 4}
                axes.plot(xs / scale, ys, color=colour(line.run), **style)
            elif len(line.xs):
                xs, reach = np.asarray(line.xs), np.abs(np.transpose(line.errors) - np.asarray(line.ys))
                style = {"fmt": "o", "markersize": 4.5, "capsize": 3, "elinewidth": 1.2}
                axes.errorbar(xs / scale, line.ys, yerr=reach, color=colour(line.run), **style)
        axes.relim()
        axes.autoscale()
        _set_scale(axes, [value for line in lines for value in line.ys])
        _set_ticks(axes.xaxis)
        axes.set_xlabel(unit)
        return self._drawn()

    def histogram(self, start: Sequence[int] | None, now: Sequence[int], total: int, run: int) -> str:
        """Counts in equal bins of timesteps 0..total, at the start (filled) and now (lines), as <svg>."""
        axes = self._empty()
        edges = np.linspace(0, total, len(now) + 1)
        if start is not None and len(start) == len(now):
            axes.stairs(start, edges, fill=True, color=_START, linewidth=0)
        axes.stairs(now, edges, color=colour(run), linewidth=1.6)
        axes.set_xlim(0, total)
        axes.set_ylim(0, 1.1 * max([*now, *(start or [])]) or 1)
        axes.set_yscale("linear")
        _set_ticks(axes.xaxis)
        _set_ticks(axes.yaxis)
        axes.set_xlabel("timestep, from clean to noise")
        return self._drawn()

    def _empty(self) -> Any:
        axes = self._axes
        for container in list(axes.containers):  # its lines are the axes' too
            container.remove()
        for artist in [*axes.lines, *axes.patches]:
            artist.remove()
        return axes

    def _drawn(self) -> str:
        from matplotlib import rc_context

        # Identifiers of one chart must not be those of another in the same page.
        with rc_context(_STYLE | {"svg.hashsalt": f"chart{next(_salts)}"}):
            file = io.BytesIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self._figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        return _inlined(file.getvalue().decode())


def _set_scale(axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values, default=0.0), max(values, default=0.0)
    if low <= 0 or high / low < 3:
        axes.set_yscale("linear")
        _set_ticks(axes.yaxis)
        return
    axes.set_yscale("log")
    near = math.log10(high / low) < 1.5
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_minor_locator(NullLocator())


def _set_ticks(axis) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: object = None) -> str:
    """A number for a tick: 1200 as 1.2k."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{name}"
    return f"{value:.4g}".replace("e-0", "e-")


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """As many points as a small chart can show; each is the mean of some that follow each other."""
    pieces = min(len(xs), _MOST_POINTS)
    if not pieces:
        return np.zeros(0), np.zeros(0)
    means = [[piece.mean() for piece in np.array_split(np.asarray(v, float), pieces)] for v in (xs, ys)]
    return np.asarray(means[0]), np.asarray(means[1])


def _inlined(text: str) -> str:
    """What matplotlib wrote as a part of a page: no prologue, only identifiers that are used, our colours."""
    ElementTree.register_namespace("", _NAMESPACE)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    for metadata in root.findall(f"{{{_NAMESPACE}}}metadata"):
        root.remove(metadata)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("aria-hidden", "true")  # the figure around it says what it shows
    return _recoloured(re.sub(r"\s*\n\s*", " ", ElementTree.tostring(root, encoding="unicode")))


def _recoloured(svg: str) -> str:
    svg = re.sub(r"font(?:-family)?: ?(?:([\d.]+px) )?'[^;\"]*", _font_size, svg)
    for stand_in, variable in _STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(r"#0a0c([0-9a-f]{2})", lambda match: f"var(--run-{int(match[1], 16)})", svg)


def _font_size(match: re.Match) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-style: normal"
