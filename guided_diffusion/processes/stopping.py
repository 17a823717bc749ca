"""Stopping a run in good order: SIGTERM (SLURM's preemption) and SIGINT (Ctrl-C)."""

import signal
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to continue


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while the block runs; a second one acts at once.

    Attributes:
        received: the first signal's name, or "" before there was one.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # started in the background, where Ctrl-C is meant for others
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: it was set outside Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()


class Stopped(Exception):
    """The run was asked to stop, and has saved a checkpoint."""
