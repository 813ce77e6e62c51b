"""All ranks of a job as processes of this machine: started, followed, ended together.

`launch_local(spec)` returns the job's exit code. Whatever happens (a rank dies, Ctrl-C, SIGTERM, an error here), no
process of the job is left when it returns; when the launcher itself is killed, `launch.worker` ends the ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TextIO

from launch.spec import LAUNCHER_PID, STORE_FD, TERMINAL, JobSpec
from launch.starter import Failure
from launch.supervise import supervise
from launch.tee import Tee

HOST = "127.0.0.1"
TERM_S = 5.0
"""Between SIGTERM and SIGKILL."""
SAVING_TERM_S = 0.5
"""The same where SIGTERM asks for a save: the job has failed, and nothing will come of it."""
PIPE_BYTES = 1 << 20
"""Capacity of the pipe for rank 0's output; Linux's limit for users other than root."""
VIOLENT = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
VIOLENT_LEAD_S = 0.5
"""A killed process closes its connections before its launcher hears of it, so a peer's error can look earlier. Such
deaths are never a consequence of another rank's (SIGABRT is: gloo aborts on a message it did not expect)."""


class Rank:
    """One process, its own session, and the thread that waits for it."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.process = process
        self.code: int | None = None
        self.ended_at = 0.0  # seconds since 1970
        self.tee: Tee | None = None
        self.lock = threading.Lock()

    def wait(self, wake: SimpleQueue[object]) -> None:
        """Body of the waiting thread. What the rank started is killed before its id is given back to the system."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            self.ended_at = time.time()
            self.signal(signal.SIGKILL)
        code = self.process.wait()
        with self.lock:
            self.ended_at = self.ended_at or time.time()
            self.code = code
        wake.put(self)

    def signal(self, number: int) -> None:
        """Send a signal to the rank and to every process it started."""
        with self.lock, suppress(ProcessLookupError, PermissionError):
            if self.code is None:
                os.killpg(self.process.pid, number)

    def failed_at(self, error_file: Path) -> float:
        """When the rank says it failed, else when it ended (a rank takes a while to leave after it has failed)."""
        if self.code is not None and -self.code in VIOLENT:
            return self.ended_at - VIOLENT_LEAD_S
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(error_file.read_text())["time"])
        return self.ended_at

    def how(self) -> str:
        """`killed by SIGKILL` or `exit code 1`."""
        if self.code is None or self.code >= 0:
            return f"exit code {self.code}"
        try:
            return f"killed by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"killed by signal {-self.code}"


class LocalRanks:
    """The processes of one attempt."""

    live = True

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.ranks: list[Rank] = []
        self.wake: SimpleQueue[object] = SimpleQueue()
        self.stream: TextIO = sys.stderr if spec.live_on_stderr else sys.stdout

    def start(self, env: Mapping[str, str]) -> None:
        """Start every rank. The port of the rendezvous is held by a listening socket from here until rank 0 serves it,
        so that nobody else can take it and no rank can come too early."""
        self.ranks = []
        try:
            with socket.create_server((HOST, 0), backlog=max(128, self.spec.ranks)) as server:
                for rank in range(self.spec.ranks):
                    self.ranks.append(self._start_rank(rank, server, env))
        except BaseException:
            self._abandon()
            raise
        for started in self.ranks:
            threading.Thread(target=started.wait, args=(self.wake,), name=f"rank{started.rank}", daemon=True).start()

    def _start_rank(self, rank: int, server: socket.socket, more: Mapping[str, str]) -> Rank:
        spec = self.spec
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        for name in (STORE_FD, TERMINAL):
            env.pop(name, None)
        env.update(more)
        env.update(spec.rank_env(rank, HOST, server.getsockname()[1]))
        env[LAUNCHER_PID] = str(os.getpid())
        inherited = []
        if rank == 0:
            inherited = [server.fileno()]
            env[STORE_FD] = str(server.fileno())
            if self.stream.isatty():
                env[TERMINAL] = str(shutil.get_terminal_size().columns)
        with open(spec.log_path(rank), "ab") as log:
            process = subprocess.Popen(
                spec.argv, env=env, pass_fds=inherited, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else log, stderr=log, start_new_session=True,
            )  # fmt: skip
        started = Rank(rank, process)
        if process.stdout is not None:
            widen(process.stdout.fileno())
            started.tee = Tee(process.stdout, spec.log_path(rank), self.stream)
        return started

    def running(self) -> bool:
        return bool(self._running())

    def failures(self) -> list[Failure]:
        return [
            Failure(r.rank, r.code, r.how(), r.failed_at(self.spec.error_path(r.rank))) for r in self.ranks if r.code
        ]

    def code(self) -> int:
        return max((abs(r.code or 0) for r in self.ranks), default=0)

    def where(self) -> str:
        return ""

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """End whatever still runs: SIGTERM, SIGKILL after a while or when `hurried`; returns when all are gone."""
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + (SAVING_TERM_S if self.spec.saves else TERM_S)
        while self._running() and time.monotonic() < deadline and not hurried():
            time.sleep(0.02)
        self._signal_all(signal.SIGKILL)
        while self._running():
            time.sleep(0.01)
        for rank in self.ranks:
            if rank.tee is not None:
                rank.tee.close()

    def _abandon(self) -> None:
        """End ranks that have no waiting thread yet: the start itself failed."""
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
            rank.code = rank.process.wait()

    def _signal_all(self, number: int) -> None:
        for rank in self._running():
            rank.signal(number)

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]


def widen(pipe: int) -> None:
    """Enlarge a pipe to PIPE_BYTES, if the system can.

    Rank 0 must not block on a full pipe while this launcher is suspended: it would never reach the step boundary at
    which the ranks save.
    """
    with suppress(AttributeError, OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def launch_local(spec: JobSpec) -> int:
    """Run `spec` on this machine; returns 0, the failed rank's 2 or 75, 1 for any other failure, 128 + signal."""
    if spec.nodes != 1:
        raise ValueError(f"launch_local starts one node, got {spec.nodes}")
    return supervise(spec, LocalRanks(spec), HOST)
