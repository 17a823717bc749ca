#!/usr/bin/env python
"""Score generated images against real ones.

    python evaluations/evaluator.py REF.npz SAMPLES.npz [SAMPLES2.npz ...]

Each file holds uint8 images [N, H, W, 3] as arr_0. The reference may instead, or also, hold the
statistics of an ADM reference batch (mu, sigma, mu_s, sigma_s). See docs/evaluation.md.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, overload

from evaluations.evaluation import evaluate_files
from evaluations.results import DigitsResult, InceptionResult, Result, format_result, format_table, write_json
from evaluations.settings import BACKENDS, Backend, Settings
from guided_diffusion.errors import UserError
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


@overload
def evaluate(
    reference: str | PathLike,
    samples: str | PathLike,
    *,
    backend: Literal["digits"],
    weights: str | PathLike | None = ...,
    batch_size: int = ...,
    seed: int = ...,
    kid: bool = ...,
    density_coverage: bool = ...,
    intervals: int = ...,
    device: str | None = ...,
    use_cache: bool = ...,
) -> DigitsResult: ...


@overload
def evaluate(
    reference: str | PathLike,
    samples: str | PathLike,
    *,
    backend: Literal["tensorflow", "torch"] = ...,
    weights: str | PathLike | None = ...,
    batch_size: int = ...,
    seed: int = ...,
    kid: bool = ...,
    density_coverage: bool = ...,
    intervals: int = ...,
    device: str | None = ...,
    use_cache: bool = ...,
) -> InceptionResult: ...


def evaluate(
    reference: str | PathLike,
    samples: str | PathLike,
    *,
    backend: Backend = "tensorflow",
    weights: str | PathLike | None = None,
    batch_size: int = 64,
    seed: int = 0,
    kid: bool = False,
    density_coverage: bool = False,
    intervals: int = 0,
    device: str | None = None,
    use_cache: bool = True,
) -> Result:
    """Score one sample file against a reference file.

    Args:
        reference: npz with `arr_0` uint8 [M, H, W, 3], or with ADM statistics, or both.
        samples: npz with `arr_0` uint8 [N, H, W, 3] of the same size.
        backend: the feature network: "tensorflow" (the ADM suite's graph), "torch" (the same
            network through torch-fidelity) or "digits" (the demo's classifier).
        weights: its weight file; by default the shipped, cached or downloaded one.
        batch_size: images at a time; no influence on the scores beyond rounding.
        seed: of KID's subsets and of the intervals' half-samples.
        kid: also the kernel Inception distance (Inception backends).
        density_coverage: also density and coverage (Inception backends).
        intervals: number of half-samples for 95 % intervals; 0 for none, else at least 2.
        device: torch device of the torch network and of the nearest neighbours; by default a GPU if
            there is one (Inception backends).
        use_cache: keep the reference's statistics beside its file and reuse them.

    Returns:
        the scores and what they came from. Call again for further files: the reference's
        statistics come from the cache.

    Raises:
        UserError: a mistake in the arguments or files, in one line.
    """
    settings = Settings(
        backend=backend,
        weights=None if weights is None else Path(weights),
        batch_size=batch_size,
        seed=seed,
        kid=kid,
        density_coverage=density_coverage,
        intervals=intervals,
        device=device,
        use_cache=use_cache,
    )
    return next(evaluate_files(Path(reference), [Path(samples)], settings))


def main() -> None:
    """Parse, check, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        "--no_cache", action="store_true", help="neither read nor write statistics beside the reference"
    )
    parser.add_argument("--output", type=local_path, help="also write a JSON record here")
    args = parser.parse_args()
    warnings.showwarning = _show_warning
    settings = Settings(
        backend=args.backend,
        weights=args.weights,
        batch_size=args.batch_size,
        seed=args.seed,
        kid=args.kid,
        density_coverage=args.density_coverage,
        intervals=args.intervals,
        device=args.device,
        use_cache=not args.no_cache,
    )
    if args.output is not None and args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder, a file to write is wanted")
    results: list[Result] = []
    try:
        for result in evaluate_files(args.reference, args.samples, settings):
            results.append(result)
            if args.output is not None:
                write_json(results, args.output)
    finally:
        if results:  # those before a damaged file too
            print(_report(results))


def _report(results: Sequence[Result]) -> str:
    return format_result(results[0]) if len(results) == 1 else format_table(results)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
