#!/usr/bin/env python
"""Score generated images against real ones.

    python evaluations/evaluator.py REF.npz SAMPLES.npz [SAMPLES2.npz ...]

Each file holds uint8 images [N, H, W, 3] as arr_0. The reference may instead, or also, hold the
statistics of an ADM reference batch (mu, sigma, mu_s, sigma_s). See docs/evaluation.md.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from evaluations.evaluation import evaluate_files
from evaluations.results import (
    DigitsResult,
    InceptionResult,
    Result,
    format_result,
    format_table,
    require_replaceable,
    write_json,
)
from evaluations.settings import BACKENDS, Settings
from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


@overload
def evaluate(
    reference: str | PathLike, samples: str | PathLike, *, backend: Literal["digits"], **settings: Any
) -> DigitsResult: ...


@overload
def evaluate(
    reference: str | PathLike,
    samples: str | PathLike,
    *,
    backend: Literal["tensorflow", "torch"] = ...,
    **settings: Any,
) -> InceptionResult: ...


def evaluate(reference: str | PathLike, samples: str | PathLike, **settings: Any) -> Result:
    """Score one sample file against a reference file.

    Args:
        reference: npz with `arr_0` uint8 [M, H, W, 3], or with ADM statistics, or both.
        samples: npz with `arr_0` uint8 [N, H, W, 3]; another size than the reference's is warned of.
        settings: fields of `Settings` by name, such as `backend="digits"` or `intervals=20`.

    Returns:
        the scores and what they came from. Call again for further files: the reference's
        statistics come from the cache.

    Raises:
        UserError: a mistake in the settings or files, in one line.
    """
    return next(evaluate_files(Path(reference), [Path(samples)], Settings(**settings)))


def main() -> None:
    """Parse, check, score, print."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("reference", type=Path, help="npz of the real images, or their statistics")
    parser.add_argument("samples", type=Path, nargs="+", help="npz of generated images; several give a table")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="tensorflow", help="feature network (default tensorflow)"
    )
    parser.add_argument(
        "--inception",
        "--weights",
        dest="weights",
        type=Path,
        help="the feature network's weight file (default: downloaded once; digits: the shipped one)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--kid", action="store_true", help="also the kernel Inception distance")
    parser.add_argument("--density_coverage", action="store_true", help="also density and coverage (k = 5)")
    parser.add_argument(
        "--intervals",
        type=int,
        default=0,
        metavar="R",
        help="95 %% intervals from R half-samples, 20 or more to be of use (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --kid and --intervals (default 0)")
    parser.add_argument(
        "--device", help="torch device (default: a GPU if there is one); TensorFlow chooses its own"
    )
    parser.add_argument(
        "--no_cache",
        dest="use_cache",
        action="store_false",
        help="neither read nor write statistics beside the reference",
    )
    parser.add_argument("--output", type=local_path, help="also write a JSON record here")
    args = parser.parse_args()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.output is not None:
        _require_writable(args.output)
    results: list[Result] = []
    try:
        for result in evaluate_files(args.reference, args.samples, settings):
            results.append(result)
            if args.output is not None:
                write_json(results, args.output)
    finally:
        if results:  # those before a damaged file too
            print(_report(results))


def _require_writable(output: Path) -> None:
    """Tell now what would else be told after hours.

    Raises:
        UserError: it is no file, is to be of images, or holds something else.
        OSError: it cannot be written.
    """
    if output.exists() and not output.is_file():
        kind = "a folder" if output.is_dir() else "no file"
        raise UserError(f"--output {output} is {kind}, a file to write is wanted")
    if output.suffix == ".npz":
        raise UserError(f"--output {output} is the name of images, a JSON file to write is wanted")
    if output.is_file():
        require_replaceable(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output.parent).close()


def _report(results: Sequence[Result]) -> str:
    return format_result(results[0]) if len(results) == 1 else format_table(results)


if __name__ == "__main__":
    run_script(main)
