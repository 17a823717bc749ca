"""The results of `benchmarks/gpu.py` as a section of a page."""

from collections.abc import Iterable
from typing import Any

_PRODUCT = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16", "fp16": "float16"}
_LEGEND = """\
"original" stands for the originals' loop: 16-bit weights, flat float32 copies of them optimised and averaged
by plain operations, contiguous layout, attention that writes its weights out. "Of limit" is the arithmetic
per second over that of a matrix product in the same format; "gaps" an iteration less the time in its kernels,
as the profiler tells it. The loss is that of the first five iterations, from the same weights, samples and
noise: it is the same but for rounding, compiled dropout, and what float16 skips until its loss scale fits."""
Results = dict[str, dict[str, Any]]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose columns are of equal width, to be read as it is."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def checks(results: Results) -> str:
    """What was looked at, and whether it is as it should be."""
    rows = []
    for part, rows_of_part in results.items():
        for one in rows_of_part:
            allowed = one["allowed"]
            verdict = "" if allowed is None else "yes" if one["found"] <= allowed else "**NO**"
            limit = "" if allowed is None else f"{allowed:.3g}"
            rows.append([part, one["what"], f"{one['found']:.3g}", limit, verdict])
    return table(["part", "looked at", "found", "allowed", "right"], rows)


def wrong(whole: dict[str, Any]) -> list[str]:
    """The parts that found something that is not as it should be."""
    results = {name: record["result"] for name, record in whole["parts"].items() if "result" in record}
    return [
        name
        for name, rows in results.items()
        if isinstance(rows, list)
        and any(one["allowed"] is not None and not one["found"] <= one["allowed"] for one in rows)
    ]


def speeds(ways: list[dict[str, Any]], device: dict[str, Any]) -> str:
    """Times and rates of every way of running an iteration, by batch size, the fastest first."""
    slow = {way["batch_size"]: way["seconds"]["iteration"] for way in ways if way["mode"] == "original"}
    rows = []
    for way in sorted(ways, key=lambda way: (-way["batch_size"], way["seconds"]["iteration"])):
        size, seconds = way["batch_size"], way["seconds"]
        ratio, share = "", ""
        if size in slow:
            ratio = f"{slow[size] / seconds['iteration']:.2f}"
        if device:
            product = f"matrix product, {_PRODUCT[way['precision']]}"
            rate = size * device["flops"]["iteration"] / seconds["iteration"]
            share = f"{rate / device['rates'][product]:.0%}"
        rows.append(
            [
                *(str(size), way["precision"], way["mode"]),
                *(f"{1e3 * seconds[name]:.1f}" for name in ("teacher", "iteration", "sampling")),
                *(f"{size / seconds['iteration']:.0f}", ratio, share, str(way["kernels"])),
                f"{1e3 * (seconds['iteration'] - way['kernel_seconds']):.1f}",
                "" if way["peak_gb"] is None else f"{way['peak_gb']:.1f}",
                f"{way['loss']:.4g}",
            ]
        )
    head = ["batch", "arithmetic", "way", "teacher step, ms", "iteration, ms", "sampling step, ms"]
    head += ["samples/s", "times original", "of limit", "kernels", "gaps, ms", "peak, GB", "loss"]
    return table(head, rows)


def section(whole: dict[str, Any]) -> str:
    """All there is, as Markdown."""
    results = {name: record["result"] for name, record in whole["parts"].items() if "result" in record}
    errors = {name: record["error"] for name, record in whole["parts"].items() if "error" in record}
    facts = whole["machine"]
    described = ", ".join(value if key == "device" else f"{key} {value}" for key, value in facts.items())
    revisions = sorted(
        {str(record["revision"]) for record in whole["parts"].values() if "revision" in record}
    )
    parts = [f"## {facts['device']}", f"{described}; revision {', '.join(revisions)}."]
    looked_at = {name: result for name, result in results.items() if isinstance(result, list)}
    if looked_at:
        parts += ["### Is it right", checks(looked_at)]
    device = results.get("rates", {})
    ways = [result for result in results.values() if "mode" in result]
    if ways:
        parts += [
            "### How fast",
            speeds(ways, device),
            _LEGEND,
        ]
    if device:
        rows = [
            [name, f"{rate / 1e12:.2f} {'TB/s' if name.startswith('copy') else 'TFLOP/s'}"]
            for name, rate in device["rates"].items()
        ]
        parts += ["### The device itself", table(["", "rate"], rows)]
    if errors:
        parts += ["### Not there", table(["part", "error"], errors.items())]
    return "\n\n".join(parts) + "\n"
