"""Run a study: many runs with several seeds and equal budgets, scored alike, compared in one report.

A study that was stopped or killed continues with the same command; what has a result is never run again.
docs/studies.md describes the study's file and everything that is written.
"""

import os
from pathlib import Path

from guided_diffusion.config.command_line import make_bare_parser, positive
from guided_diffusion.config.paths import find_config, output_path, project_root
from guided_diffusion.errors import UserError
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script
from guided_diffusion.studies.cells import reference_path
from guided_diffusion.studies.study_file import Study, load_study


def main() -> None:
    """Parse, run, report."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("study", type=find_config, help="the study's YAML file")
    parser.add_argument("--out", type=local_path, help="where it is run (default: experiments/study/NAME)")
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time, of one thread each if several (default 1)"
    )
    parser.add_argument(
        "--only",
        default=[],
        action="append",
        metavar="PATTERN",
        help="of the runs, RUN or RUN/BUDGET/SEED alone; several times: in that order",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, only make the report")
    parser.add_argument(
        "--fresh", action="store_true", help="forget results that came along: only what --out holds counts"
    )
    args = parser.parse_args()
    study = load_study(args.study)
    root = project_root(args.study)
    out = (args.out or output_path(f"experiments/study/{study.name}", args.study)).resolve()
    if args.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from guided_diffusion.studies.commands import Commands
    from guided_diffusion.studies.report import write_report
    from guided_diffusion.studies.runner import Runner, known_results

    reference = reference_path(study)
    if study.reference == "digits" and not reference.is_file():
        Commands(root).run(
            out / "commands.log", "datasets/digits.py", "--out", reference.parent, "--size", study.image_size
        )
    results = known_results(study, out, root, args.fresh)
    failures = []
    if not args.report:
        failures = Runner(study, out, root, results, scorer(study, reference), args.jobs).run(args.only)
    report = root / study.report if study.report and not args.fresh else out / "report.md"
    page = root / "docs/studies.md"  # there in a checkout
    how = f"[how]({os.path.relpath(page, report.parent)})" if page.is_file() else "see docs/studies.md"
    write_report(study, results, out, report, how)
    print(f"report: {report}")
    if failures:
        raise UserError(f"{len(failures)} cells failed and have no result; the first: {failures[0]}")


def scorer(study: Study, reference: Path):
    """A function that scores an npz of samples against a reference's.

    Raises:
        UserError: the study's samples or its reference cannot be scored so.
    """
    from evaluations.evaluation import evaluate_files, reference_images, require_scorable
    from evaluations.results import values
    from evaluations.settings import Settings
    from guided_diffusion.io.npz_reader import NpzFile

    settings = Settings(backend=study.backend)  # type: ignore[arg-type]
    keys = (f"{study.path}: backend", f"{study.path}: metrics.samples")
    require_scorable(settings, study.image_size, study.metrics.samples, keys)
    reference_images(NpzFile(reference), settings)

    def score(reference: Path, images: Path) -> dict[str, float]:
        return values(next(evaluate_files(reference, [images], settings)))

    return score


if __name__ == "__main__":
    run_script(main)
