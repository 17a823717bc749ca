"""Who started this process: mpiexec, torchrun, SLURM or nobody. Imports nothing heavy."""

import errno
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from ..errors import UserError, message_of, printable
from ..io.progress import warn
from . import cores  # noqa: F401 - which counts from now on, before torch is imported
from .stopping import EXIT_STOPPED, GRACE, Stopped, StoppedHere, stoppable

# launcher -> (rank, world size, rank on this host), in the order in which they are looked for.
# torchrun comes first: it may itself be started by srun, once per host.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpi (Open MPI)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    "mpi (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class Launch:
    """How this process was started. `local_rank` is None where only the hosts' names can tell."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None

    @property
    def is_mpi(self) -> bool:
        """Whether an MPI launcher started this process, so that mpi4py may be imported."""
        return self.launcher.startswith("mpi")


@dataclass(frozen=True)
class OtherRanks:
    """How this process ends without leaving others that wait for it.

    Attributes:
        leave_together: takes the exit status; returns once all ranks have called it, or else ends them all.
        abort: takes the exit status; ends all ranks, whatever they are doing.
        rank_zero_tells: takes a mistake that this rank ends with; whether rank 0 ends with the same.
    """

    leave_together: Callable[[int], None]
    abort: Callable[[int], NoReturn]
    rank_zero_tells: Callable[[str], bool]


_others: OtherRanks | None = None


def register_other_ranks(others: OtherRanks) -> None:
    """Tell `run_script` that from now on there are other ranks."""
    global _others
    _others = others


def detect_launch() -> Launch:
    """Read the launcher's environment variables; one process when there are none.

    Raises:
        UserError: a launcher's variable does not hold a number.
    """
    for launcher, names in _VARIABLES.items():
        if names[0] not in os.environ or names[1] not in os.environ:
            continue
        if launcher == "slurm" and "SLURM_STEP_ID" not in os.environ:
            continue  # inside an allocation (sbatch, salloc) but not started by srun
        if names[0] == "PMI_RANK" and names[2] not in os.environ and "SLURM_STEP_ID" in os.environ:
            continue  # srun speaks MPI's protocol too (--mpi=pmi2); mpiexec also sets the local rank
        try:
            rank, world_size = int(os.environ[names[0]]), int(os.environ[names[1]])
            local = os.environ.get(names[2])
            launch = Launch(launcher, rank, world_size, None if local is None else int(local))
        except ValueError as error:
            raise UserError(f"{launcher} set {names} to something that is no number: {error}") from None
        if not 0 <= rank < world_size:
            raise UserError(f"{launcher} set {names[0]} to {rank}, of {world_size} ranks")
        return launch
    return Launch("none", 0, 1, 0)


def run_script(main: Callable[[], None], *, ranks_meet: bool = False) -> None:
    """Run a script's `main`; a `UserError` becomes one line on standard error and exit status 1.

    So does a file that cannot be read or written. A command that was asked to stop, by SIGTERM or SIGINT at
    whatever moment, exits with `stopping.EXIT_STOPPED`.

    Each rank that fails says so, except that a mistake which rank 0 finds too (a wrong flag, a missing file)
    is told by rank 0 alone. A rank that fails alone takes the others with it. A warning is one line on
    standard error, without its place in the code.

    Args:
        main: the script.
        ranks_meet: whether it calls `dist_util.setup_dist`, so that ranks wait for each other there.
    """
    warnings.showwarning = lambda message, *place: warn(str(message))
    waited_for = False
    try:
        waited_for = ranks_meet and detect_launch().world_size > 1
        with stoppable(_end_all, alone=not waited_for):
            main()
    except UserError as error:
        _tell_and_leave(error, waited_for)
        sys.exit(1)
    except Stopped as reason:
        if _rank() == 0:
            print(f"{reason}; run the same command again to continue", file=sys.stderr, flush=True)
        if isinstance(reason, StoppedHere) and _others is not None:
            _others.leave_together(EXIT_STOPPED)
        sys.exit(EXIT_STOPPED)
    except OSError as error:
        if error.errno == errno.EPIPE and _others is None and _reader_is_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
            sys.exit(1)
        if error.filename is None and error.errno != errno.ENOSPC:
            _fail(waited_for)
            raise
        _tell_and_leave(error, waited_for)
        sys.exit(1)
    except Exception:
        _fail(waited_for)
        raise


def _reader_is_gone() -> bool:
    """Whether the program that reads this one's output has closed it, as `head` does."""
    if sys.stdout is None:
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _rank() -> int:
    """This process's number; 0 if its launcher is not understood, which every rank then tells."""
    try:
        return detect_launch().rank
    except UserError:
        return 0


def _tell_and_leave(error: Exception, waited_for: bool) -> None:
    """Tell a mistake in one line, and end together with the other ranks, if there are any."""
    mistake, told = message_of(error), False
    if _others is None and _rank() == 0:
        _tell(mistake)
        told = True
    if _others is None and waited_for:
        _meet_to_fail()
    if _others is not None:
        if not _others.rank_zero_tells(mistake) and not told:
            _tell(f"[rank {_rank()}] {mistake}")
        _others.leave_together(1)


def _tell(what: str) -> None:
    print(f"error: {printable(what)}", file=sys.stderr, flush=True)


def _meet_to_fail() -> None:
    """Meet the ranks that wait for this one, so that they end with it."""
    from .rendezvous import meet_to_fail  # which imports torch: no other failure needs it

    with suppress(UserError):  # which the others meet as well, and tell
        meet_to_fail()


def _end_all(status: int) -> None:
    """End all ranks when this one was asked to stop, and is held up where it cannot."""
    if _rank() == 0:
        what = f"stopped after {GRACE:g} seconds of being held up"
        print(f"{what}; run the same command again to continue", file=sys.stderr)
    if _others is not None:
        _others.abort(status)
    os._exit(status)


def _fail(waited_for: bool) -> None:
    """Show the present exception's traceback and end all ranks, if there are others."""
    lines = traceback.format_exc().splitlines()
    if _others is None and waited_for:
        _meet_to_fail()
    if _others is not None:
        print(*(f"[rank {_rank()}] {line}" for line in lines), sep="\n", file=sys.stderr)
        _others.abort(1)
