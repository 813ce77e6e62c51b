"""Ranks that another program starts: srun, torchrun or mpirun is this starter's only child.

The ranks write their own logs and beat to the watch; the program's own words go to `log`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import psutil

from launch.spec import LAUNCHER_PID
from launch.starter import Failure

LEAVE_S = 5.0
"""Ranks that were told to leave do; then they are killed."""
GONE_S = 15.0


def start_process(argv: Sequence[str], env: Mapping[str, str], log: int) -> subprocess.Popen[bytes]:
    """Start a process that writes to the descriptor `log`, in a session of its own."""
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


class CommandRanks:
    """The ranks of one attempt, started by one command."""

    live = False

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, end_elsewhere: Callable[[], None] | None = None
    ) -> None:
        """`end_elsewhere` kills what the command started on other hosts (Slurm's steps)."""
        self.argv, self.env, self.log, self.end_elsewhere = tuple(argv), dict(env), log, end_elsewhere
        self.wake: SimpleQueue[object] = SimpleQueue()
        self.process: subprocess.Popen[bytes] | None = None
        self.ended: int | None = None
        self.thread: threading.Thread | None = None

    def start(self, env: Mapping[str, str]) -> None:
        """Start the command, in a session of its own: Ctrl-C is for the supervisor alone."""
        whole = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **self.env, **env}
        whole[LAUNCHER_PID] = "parent"
        self.ended = None
        with open(self.log, "ab") as log:
            argv = (sys.executable, "-m", "launch.tied", str(os.getpid()), *self.argv)
            self.process = start_process(argv, whole, log.fileno())
        self.thread = threading.Thread(target=self._wait, args=(self.process,), name="starter", daemon=True)
        self.thread.start()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        self.ended = process.wait()
        self.wake.put(self)

    def running(self) -> bool:
        return self.process is not None and self.ended is None

    def failures(self) -> list[Failure]:
        return []

    def code(self) -> int:
        """Its exit code; 1 where it was killed."""
        return 0 if not self.ended else self.ended if self.ended > 0 else 1

    def where(self) -> str:
        return str(self.log)

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """The ranks have been told to leave over the watch; whatever stays is killed, here and elsewhere."""
        deadline = time.monotonic() + LEAVE_S
        while self.running() and time.monotonic() < deadline and not hurried():
            time.sleep(0.05)
        if not self.running() or self.process is None:
            return
        if self.end_elsewhere is not None:
            self.end_elsewhere()
        self._kill_tree(self.process.pid)
        if self.thread is not None:
            self.thread.join(GONE_S)

    def _kill_tree(self, pid: int) -> None:
        """The command and all that descends from it, in whatever sessions."""
        with suppress(psutil.Error):
            top = psutil.Process(pid)
            for process in [top, *top.children(recursive=True)]:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
