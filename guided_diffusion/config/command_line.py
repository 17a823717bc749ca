"""What the scripts' command lines share. Imports no torch, so that --help and mistakes answer at once."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..io.remote import is_url, local_path, normalised
from ..io.shipped import SHIPPED
from .foreign import find_folder
from .known_models import whence
from .loading import find_config, input_folders, load_distillation, load_experiment, project_root
from .settings import SECTIONS, DistillationExperiment, Experiment, describe_keys


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (--help lists the options)")


def make_parser(
    description: str, sections: Iterable[str], without_config: str = ""
) -> argparse.ArgumentParser:
    """A parser with --config, key=value overrides, and the configuration's keys at the end of --help.

    Args:
        description: the script's purpose.
        sections: the configuration sections it reads.
        without_config: what it goes by without --config; "" if it needs one.
    """
    lines = ["configuration keys (override any with section.key=value):"]
    for name in sections:
        for key, default, meaning in describe_keys(SECTIONS[name], name):
            lines.append(f"  {name}.{key} = {default!r}: {meaning}")
    parser = make_bare_parser(description, "\n".join(lines))
    parser.add_argument(
        "--config",
        type=find_config,
        required=not without_config,
        help="YAML configuration, of the working directory or the library's"
        f"{without_config and f' (default: {without_config})'}",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a configuration key")
    return parser


def make_bare_parser(description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser that knows nothing yet.

    Args:
        description: the script's purpose.
        epilog: the end of --help.
    """
    return _Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Experiment]:
    """Parse the command line and load the configuration it names.

    Raises:
        UserError: any mistake in either.
    """
    args = parser.parse_intermixed_args()
    return args, load_experiment(args.config, args.overrides)


def parse_distillation(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, DistillationExperiment]:
    """`parse` a configuration that has a teacher.

    Raises:
        UserError: any mistake, or it has none.
    """
    args = parser.parse_intermixed_args()
    return args, load_distillation(args.config, args.overrides)


def boolean(text: str) -> bool:
    """A truth value on the command line: True or False, as in `--use_ddim False`."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def not_negative(text: str) -> int:
    """A whole number, 0 or more, on the command line."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number above 0 on the command line."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def input_file(name: str, config: Path, what: str) -> str:
    """The model a key or flag names: in one of `loading.input_folders`, in the library
    (`model/digits_teacher.pt`), or on the Hub.

    Returns:
        The path of an existing file or folder, or a URL, which `dist_util.local_copy` fetches.

    Raises:
        UserError: no name, no such file, or no URL that is known.
    """
    if not name:
        raise UserError(f"{config}: {what} is not set")
    if is_url(name):
        return normalised(name)
    folders = input_folders(config)
    for folder in (*folders, SHIPPED):
        if (path := folder / name).is_file():
            return name if folder == Path.cwd() else str(path)
    if found := find_folder(name, folders):
        return str(found)
    places = "" if Path(name).is_absolute() else f" in {', '.join(map(str, folders))}"
    raise UserError(f"{what}: no such file: {name}{places}{whence(name)}")


def output_path(name: str | Path, config: Path) -> Path:
    """A path of a configuration that is written: relative ones lie in the configuration's project.

    Raises:
        UserError: it is a URL.
    """
    return project_root(config) / local_path(str(name))


def remote_path(config: Path) -> Path:
    """Where the local directories of URLs lie."""
    return output_path("experiments/remote", config)


def fetched_path(config: Path) -> Path:
    """Where the local copies of files at URLs lie."""
    return remote_path(config) / "files"


def per_rank(batch_size: int, world_size: int, what: str) -> int:
    """One rank's share of a batch.

    Raises:
        UserError: the ranks do not divide it.
    """
    if batch_size % world_size:
        raise UserError(f"{what} {batch_size} cannot be divided evenly among {world_size} ranks")
    return batch_size // world_size
