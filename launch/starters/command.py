"""Start ranks through one command: srun, torchrun or mpirun, the starter's only child process.

The ranks write their own logs and send heartbeats to the watch; the command's own output goes to `log`.
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

from dist_gpt.protocol import LAUNCHER_PID
from launch.starter import Failure

LEAVE_S = 5.0
"""Seconds in which ranks that were told to exit may do so before they are killed."""
GONE_S = 15.0


def start_process(argv: Sequence[str], env: Mapping[str, str], log: int) -> subprocess.Popen[bytes]:
    """Start a process that writes to the descriptor `log`, in its own session."""
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


class CommandRanks:
    """Ranks of one attempt, started by one command."""

    live = False

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log: Path, end_elsewhere: Callable[[], None] | None = None
    ) -> None:
        """Store the command; `end_elsewhere` kills what it has started on other hosts (Slurm's steps)."""
        self.argv, self.env, self.log, self.end_elsewhere = tuple(argv), dict(env), log, end_elsewhere
        self.wake: SimpleQueue[object] = SimpleQueue()
        self.process: subprocess.Popen[bytes] | None = None
        self.ended: int | None = None
        self.thread: threading.Thread | None = None

    def start(self, env: Mapping[str, str]) -> None:
        """Start the command in its own session, so that Ctrl-C reaches only the supervisor."""
        whole = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ, **self.env, **env}
        whole[LAUNCHER_PID] = "parent"
        self.ended = None
        with open(self.log, "ab") as log:
            argv = (sys.executable, "-m", "launch.rank.lifeline", str(os.getpid()), *self.argv)
            self.process = start_process(argv, whole, log.fileno())
        self.thread = threading.Thread(target=self._wait, args=(self.process,), name="starter", daemon=True)
        self.thread.start()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        self.ended = process.wait()
        self.wake.put(self)

    def running(self) -> bool:
        """Return whether the command still runs."""
        return self.process is not None and self.ended is None

    def failures(self) -> list[Failure]:
        """Return an empty list: only the end of the whole command is known."""
        return []

    def code(self) -> int:
        """Return the exit code of the command; 1 if it was killed."""
        return 0 if not self.ended else self.ended if self.ended > 0 else 1

    def where(self) -> str:
        """Return the path of the command's own log."""
        return str(self.log)

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """Wait up to LEAVE_S, less if `hurried`, for ranks told to exit over the watch; kill the rest on all hosts."""
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
        """Kill the command and all its descendants, whatever their sessions."""
        with suppress(psutil.Error):
            top = psutil.Process(pid)
            for process in [top, *top.children(recursive=True)]:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
