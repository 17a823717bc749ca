"""What the scripts' command lines share. Imports no torch, so that --help and mistakes answer at once."""

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .loading import load_distillation, load_experiment
from .paths import find_config, input_file, output_path
from .settings import SECTIONS, DistillationExperiment, Experiment, describe_keys


class _Parser(argparse.ArgumentParser):
    """Attributes: `keys`, the configuration's, which the command takes as `key=value`."""

    keys: tuple[str, ...] = ()

    def error(self, message: str) -> None:  # type: ignore[override]
        hint = "--help lists the options"
        if unknown := re.match(r"unrecognized arguments: --([\w.]+)", message):
            name, options = unknown[1], [o for action in self._actions for o in action.option_strings]
            keys = [key for key in self.keys if name in (key, key.rpartition(".")[2])]
            nearest = difflib.get_close_matches(f"--{name}", options, n=1)
            if keys:
                hint = f"{name} is a key of the configuration: {' or '.join(f'{key}=VALUE' for key in keys)}"
            elif nearest:
                hint = f"did you mean {nearest[0]}?"
        raise UserError(f"{message} ({hint})")


def make_parser(
    description: str, sections: Iterable[str], without_config: str = ""
) -> argparse.ArgumentParser:
    """A parser with --config, key=value overrides, and the configuration's keys at the end of --help.

    Args:
        description: the script's purpose.
        sections: the configuration sections it reads; "" for the top level of a baseline.
        without_config: what it goes by without --config; "" if it needs one.
    """
    lines, keys = ["configuration keys (override any with section.key=value):"], []
    for name in sections:
        for key, default, meaning in describe_keys(SECTIONS[name or "student"], name):
            keys.append(f"{name}{'.' if name else ''}{key}")
            lines.append(f"  {keys[-1]} = {default!r}: {meaning}")
    parser = make_bare_parser(description, "\n".join(lines))
    parser.keys = tuple(keys)
    parser.add_argument(
        "--config",
        type=find_config,
        required=not without_config,
        help="YAML configuration, of the working directory or the library's"
        f"{without_config and f' (default: {without_config})'}",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a configuration key")
    return parser


def make_bare_parser(description: str | None, epilog: str = "") -> _Parser:
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


def add_run_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add what every training takes: --resume_checkpoint, --exp_dir and --wandb.

    Args:
        parser: the script's.
        kind: the folder under experiments/ in which new runs lie.
    """
    parser.add_argument(
        "--resume_checkpoint", help="continue from this run directory or modelNNNNNN.pt; a path or a URL"
    )
    parser.add_argument(
        "--exp_dir", help=f"the run's directory, a path or a URL (default: a new one in experiments/{kind})"
    )
    parser.add_argument("--wandb", action="store_true", help="also record to Weights & Biases")


def run_inputs(experiment: Experiment, config: Path) -> tuple[str, str]:
    """Names, as of `input_file`, of the student's initial weights and of the reference that scores it; "" for
    what is not wanted.

    Raises:
        UserError: one of them is wanted and not there.
    """
    training, run = experiment.student.training, experiment.run
    initial = reference = ""
    if training.model_path:
        initial = input_file(training.model_path, config, f"{experiment.where}model_path")
    if run.eval_interval:
        reference = input_file(run.eval_reference, config, "run.eval_reference")
    return initial, reference


def pool_path(experiment: DistillationExperiment, config: Path) -> Path:
    """Where `teacher.tempfile` lies, which an iterative distillation has no use for.

    Raises:
        UserError: it is not set, or a URL.
    """
    teacher = experiment.teacher
    if not teacher.tempfile and teacher.iter_choice != "iterative_distillation":
        raise UserError(f"{config}: teacher.tempfile is not set: where is the pool to lie?")
    return output_path(teacher.tempfile, config)


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


def per_rank(batch_size: int, world_size: int, what: str) -> int:
    """One rank's share of a batch.

    Raises:
        UserError: the ranks do not divide it.
    """
    if batch_size % world_size:
        raise UserError(f"{what} {batch_size} cannot be divided evenly among {world_size} ranks")
    return batch_size // world_size
