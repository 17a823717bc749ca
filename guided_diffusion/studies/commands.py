"""Running the project's commands beside each other, and stopping them together in good order."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.files import read_object, write_text
from ..io.shipped import SHIPPED
from ..processes.stopping import EXIT_STOPPED

# Has the kernel send a command SIGTERM when the study is killed, so that none writes on unseen (Linux).
_FOLLOW = """import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl: prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]): sys.exit(75)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"""


class StudyStopped(Exception):
    """The study was asked to stop, and this part of it did."""


class CommandFailed(UserError):
    """A command ended with an error; its own line about it."""


class Commands:
    """Runs commands from any number of threads.

    Args:
        root: the folder from which they run.
    """

    def __init__(self, root: Path):
        self.root = root
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, log: Path, script: str, *arguments: object) -> None:
        """Run one to its end; what it says is added to `log`.

        Raises:
            CommandFailed: it failed.
            StudyStopped: it was stopped, and has saved what it had.
        """
        words = [str(SHIPPED / script), *map(str, arguments)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a+", encoding="utf-8", errors="backslashreplace") as file:
            print(f"\n$ python {script} {' '.join(map(str, arguments))}", file=file, flush=True)
            start = file.tell()
            with self._lock:
                self.check()
                # In a session of its own: Ctrl-C is for the study, which asks each command to stop once.
                process = subprocess.Popen(
                    [sys.executable, "-c", _FOLLOW, str(os.getpid()), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=self.root,
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                status = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
            if status and self._stopping:
                raise StudyStopped
            if status == EXIT_STOPPED:
                raise CommandFailed(f"{script}: was stopped by somebody else")
            if status:
                file.seek(start)
                raise CommandFailed(_reason(file.read().splitlines(), script, status))

    def check(self) -> None:
        """Raise `StudyStopped` if the study was asked to stop."""
        if self._stopping:
            raise StudyStopped

    def stop(self) -> None:
        """Ask all commands to stop, and let none start any more."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                for process in self._running:
                    process.terminate()


def _reason(lines: list[str], script: str, status: int) -> str:
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{script}: {told[-1] if told else f'{last.strip()} (status {status})'}"


class Steps:
    """What has been done of something, in a file: a step that is done is never done again.

    Args:
        path: the file; other processes must not write to it at the same time.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, Any] = {}
        if path.is_file():
            try:
                self.done = read_object(path)
            except ValueError as error:
                raise UserError(f"{path}: damaged ({error}); remove it, and that is done again") from None

    def seconds(self, name: str) -> float:
        """Time spent on steps whose names begin like this, also by those that were stopped."""
        return sum(v for key, v in self.done.get("seconds", {}).items() if key.startswith(name))

    def add(self, name: str, result: Any = True) -> None:
        """Note that a step is done."""
        self.done[name] = result
        self._write()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the step's."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self.done.setdefault("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
            self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.done, indent=1))
