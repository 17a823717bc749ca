"""Run a script's own code in this process, which spares the seconds that importing torch takes."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from unittest import mock

from tiny import ROOT

from guided_diffusion.runs import start


def script_here(name, *args, check=True):
    """Like `tiny.script` on one rank: the same code, arguments, output and exit status.

    Only curves.png is left out, a second of matplotlib's; test_scripts.py has it.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [str(ROOT / name), *map(str, args)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(start, "save_curves"),
        ):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):  # as Python does
            err.write(f"{code}\n")
            code = 1
    finally:
        sys.argv = before
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    done = subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())
    assert not check or code == 0, f"{done.stdout}\n{done.stderr}"
    return done
