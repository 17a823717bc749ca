"""Stopping a command in good order: SIGTERM (SLURM's preemption) and SIGINT (Ctrl-C).

The first signal is remembered where the command acts upon it itself, inside `StopSignals`, and raises
`StoppedHere` anywhere else; not in the middle of an import, where exceptions crash extensions, but at the
next such block. A thread ends all ranks if nothing comes of the signal, because the main thread is inside a
library's own code, such as a wait for another rank: there Python's handlers do not run.
"""

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to continue
ECHO = 2.0  # seconds in which more signals are the same one: launchers pass on what all processes got
GRACE = 10.0  # seconds in which the main thread must act upon a signal outside `StopSignals`
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The command was asked to stop, and did at a point of its own choice, with all ranks.

    No `Exception`, so that no library takes it for a failure of its own.
    """


class StoppedHere(Stopped):
    """The command was asked to stop, and this rank did wherever it was; others may wait for it."""


class StopSignals:
    """While the block runs, the first SIGTERM or SIGINT is remembered; the block sees to it.

    A second signal, later than `ECHO`, ends the process at once, with status 128 + its number.

    Attributes:
        received: the first signal's name, or "" before there was one.

    Raises:
        StoppedHere: at the start of the block, if nothing has come of a signal before.
    """

    def __enter__(self) -> "StopSignals":
        self._before = _install()
        stop_if_asked()
        _state.blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.blocks -= 1
        _restore(self._before)

    @property
    def received(self) -> str:
        """Name of the signal that came, "" for none."""
        return _state.received

    @property
    def reason(self) -> str:
        """Why all ranks stop, for `Stopped`."""
        return f"stopped by {self.received or 'a signal to another rank'}"


@contextmanager
def stoppable(end_all: Callable[[int], None], *, alone: bool) -> Iterator[None]:
    """A whole command. After the block signals no longer interrupt it.

    Args:
        end_all: ends all ranks with a status, called where the main thread does not act.
        alone: there are no other ranks. Those there are wait for this one until `ranks_have_met`, and would
            not notice its end, so that until then a signal is only remembered.
    """
    _install()
    _state.received, _state.remembered, _state.blocks, _state.meeting = "", False, 0, not alone
    atexit.register(ignore_signals)  # all is done then, and Python itself would let a signal end it
    ours, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours, end_all), daemon=True, name="signals").start()
    _state.wakeup = wakeup
    try:
        yield
    finally:
        _state.blocks += 1
        _state.meeting = False


def ranks_have_met() -> None:
    """From here on the end of a rank ends the others; see `stoppable`.

    Raises:
        StoppedHere: a signal came before.
    """
    _state.meeting = False
    stop_if_asked()


class _State:
    """What has come, and whether a block sees to it."""

    received = ""
    when = 0.0  # it came, on the monotonic clock
    remembered = False  # a block has been told
    blocks = 0  # that see to signals and are running now
    meeting = False  # other ranks are going to wait for this one
    wakeup: socket.socket | None = None  # held open while signals are written to it


_state = _State()


def _install() -> dict[int, Any]:
    """Handle the signals, unless that is done; what handled them before."""
    before: dict[int, Any] = {}
    for number in _SIGNALS:
        now = signal.getsignal(number)
        # Ignored by one started in the background, where Ctrl-C is meant for others.
        if now not in (signal.SIG_IGN, _handle):
            # None: it was set outside Python, and cannot be set again.
            before[number] = signal.SIG_DFL if now is None else now
            signal.signal(number, _handle)
    if before:
        _state.received = ""
    return before


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _state.received:
        if now - _state.when < ECHO:
            return
        os._exit(128 + number)
    _state.received, _state.when = signal.Signals(number).name, now
    if _state.blocks:
        _state.remembered = True
    elif not _state.meeting and not _is_import(frame):
        stop_if_asked()


def stop_if_asked() -> None:
    """Act upon a signal that came where it could only be remembered, such as in an import.

    Raises:
        StoppedHere: there was one.
    """
    if _state.received and not _state.remembered:
        raise StoppedHere(f"stopped by {_state.received}")


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _watch(wakeup: socket.socket, end_all: Callable[[int], None]) -> None:
    """End the process at a second signal, and all ranks if the first is not acted upon."""
    first: float | None = None  # when it came
    while True:
        wakeup.settimeout(GRACE if first is not None and not _state.remembered else None)
        try:
            received = wakeup.recv(16)
        except TimeoutError:
            if not (_state.remembered or _state.blocks or _state.meeting):
                end_all(EXIT_STOPPED)
            continue
        if not received:  # the other end is closed: another command runs in this process
            return
        arrived = [number for number in received if number in _SIGNALS]
        if arrived and first is not None and time.monotonic() - first >= ECHO:
            os._exit(128 + arrived[-1])
        if arrived and first is None:
            first = time.monotonic()


def ignore_signals(worker: int = 0) -> None:
    """From here on; in a worker process, whatever its number, because its parent sees to them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """In a forked process, whose signals must not be written where its parent reads."""
    if _state.wakeup is not None:
        signal.set_wakeup_fd(-1)
        _state.wakeup = None
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_forget)
