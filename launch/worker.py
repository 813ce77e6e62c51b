"""Entry of a rank's process: `python -m launch.worker TARGET ARGS...`, TARGET a module or a .py file.

Ties the process to its launcher, then runs TARGET in the same process as `python -m TARGET ARGS...` would.
A rank whose launcher was killed would otherwise train on, hold its memory and its GPU, and nobody would know.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

from launch.spec import LAUNCHER_PID

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 1.0


def tie_to_parent(parent: int) -> None:
    """Make this process die with process `parent`, its parent: by the kernel on Linux, elsewhere by looking."""
    if not (sys.platform.startswith("linux") and _kernel_kills_us()):
        threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it died before the kernel had been told
        os._exit(1)


def _kernel_kills_us() -> bool:
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> None:
    """Run `argv` = [TARGET, ARGS...]; leaves as TARGET leaves (its exception, its SystemExit)."""
    if not argv:
        sys.exit("usage: python -m launch.worker MODULE|FILE.py [ARGS...]")
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is not None:
        tie_to_parent(int(launcher))
    sys.argv = list(argv)
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
