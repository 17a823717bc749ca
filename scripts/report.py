"""Write a page about runs: curves, scores, samples and what differs between them, in one HTML file.

It loads nothing and needs no server. docs/report.md describes it.
"""

from pathlib import Path

from guided_diffusion.config import command_line
from guided_diffusion.errors import UserError
from guided_diffusion.io.remote import local_path
from guided_diffusion.processes.launch import run_script


def main() -> None:
    """Parse, read, write."""
    parser = command_line.make_bare_parser(__doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        type=local_path,
        metavar="RUN",
        help="a run's directory; also a folder of samples, or a record that the evaluator wrote (--output)",
    )
    parser.add_argument(
        "--out", type=local_path, default=Path("report.html"), help="the page (default: report.html)"
    )
    args = parser.parse_args()
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name a file, such as {args.out / 'report.html'}")
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: is no name of a page; name one that ends in .html")

    from evaluations.results import SCORES
    from guided_diffusion.reports.page import write_report
    from guided_diffusion.reports.reading import read_material

    names = {name: title for name, (title, _, _) in SCORES.items()}
    write_report(args.out, read_material(args.paths, list(names)), names)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
