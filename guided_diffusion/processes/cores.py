"""How many of this machine's cores other programs leave free.

Threads that wait for one whose core another program has taken stand still together: beside one busy core of
two, a small network trains several times as fast on one thread as on two (docs/performance.md).
"""

import os
import time
from dataclasses import dataclass, field

_STAT = "/proc/stat"  # Linux' counters of what the cores have done


def _idle_seconds() -> float:
    """Seconds that all cores together have been idle; -1 where nobody counts them."""
    try:
        with open(_STAT) as file:
            numbers = file.readline().split()[1:]
        return (int(numbers[3]) + int(numbers[4])) / os.sysconf("SC_CLK_TCK")  # idle, waiting for a disk
    except (OSError, ValueError, IndexError):
        return -1.0


@dataclass(frozen=True)
class Watch:
    """Counts from when it is made.

    Meant to be made when a program starts and read when it has imported torch, so that looking costs no time.
    """

    started: float = field(default_factory=time.monotonic)
    own: float = field(default_factory=time.process_time)
    idle: float = field(default_factory=_idle_seconds)

    def free_cores(self) -> float:
        """Cores that were idle or busy with this process, in the mean since the start.

        All those that this process may use where the system keeps no such counts.
        """
        usable = usable_cores()
        seconds = time.monotonic() - self.started
        if self.idle < 0 or seconds <= 0:
            return usable
        spent = _idle_seconds() - self.idle + time.process_time() - self.own
        return min(usable, spent / seconds)


def usable_cores() -> int:
    """Cores that this process may use: the machine's, or those it is bound to (taskset, srun, mpiexec)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


since_start = Watch()  # `launch`, which every command imports first, imports this module
