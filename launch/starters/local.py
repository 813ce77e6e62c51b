"""Run all ranks of a job as processes of this machine: start, follow and end them together.

`launch_local(spec)` returns the job's exit code. Whatever happens (a rank dies, Ctrl-C, SIGTERM, an error here), no
process of the job is left when it returns. If the launcher itself is killed, the kernel kills the fork server and with
it the ranks.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TextIO

import psutil

from dist_gpt.protocol import STORE_FD, TERMINAL
from launch.monitor.supervisor import supervise
from launch.monitor.tee import Tee
from launch.spec import WORKER, JobSpec
from launch.starter import Failure
from launch.starters.forkserver import Order, Place, command

HOST = "127.0.0.1"
TERM_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""
SAVING_TERM_S = 0.5
"""The same if SIGTERM asks for a save: the job has failed, so the save cannot succeed."""
GONE_S = 5.0
"""Longest wait in seconds for the end of a killed rank to be reported."""
PIPE_BYTES = 1 << 20
"""Capacity of the pipe for rank 0's output; Linux's limit for users other than root."""
VIOLENT = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
VIOLENT_LEAD_S = 0.5
"""A killed process closes its connections before its launcher hears of it, so a peer's error can look earlier. Such
deaths are never a consequence of another rank's (SIGABRT can be: gloo aborts on an unexpected message)."""


class Rank:
    """Process of one rank, the leader of its own session."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pid: int | None = None
        self.code: int | None = None
        self.lost = ""  # how it ended, if its end was not seen
        self.ended_at = 0.0  # seconds since 1970
        self.lock = threading.Lock()

    def ended(self, code: int, at: float, lost: str = "") -> None:
        """Note its end; from now on its PID may be reused."""
        with self.lock:
            self.ended_at, self.lost, self.code = at, lost, code

    def signal(self, number: int) -> None:
        """Send a signal to the rank and to every process it started."""
        with self.lock, suppress(ProcessLookupError, PermissionError):
            if self.code is None and self.pid is not None:
                os.killpg(self.pid, number)

    def is_there(self) -> bool:
        """Return whether its process still runs; a zombie does not."""
        try:
            return self.pid is not None and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def failed_at(self, error_file: Path) -> float:
        """Return when the rank says it failed, else when it ended (a rank takes a while to exit after a failure)."""
        if self.code is not None and -self.code in VIOLENT:
            return self.ended_at - VIOLENT_LEAD_S
        with suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(error_file.read_text())["time"])
        return self.ended_at

    def how(self) -> str:
        """Return how it ended: `killed by SIGKILL` or `exit code 1`."""
        return self.lost or how(self.code)


def how(code: int | None) -> str:
    """Return how a process ended: `killed by SIGKILL` or `exit code 1`."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def start_server(argv: Sequence[str], env: Mapping[str, str], log: int, fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a fork server that writes to the descriptor `log` and inherits `fds`, in its own session."""
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                            start_new_session=True, pass_fds=fds)  # fmt: skip


class LocalRanks:
    """Processes of one attempt, forked by launch.starters.forkserver."""

    live = True

    def __init__(self, spec: JobSpec) -> None:
        if spec.argv[1 : 1 + len(WORKER)] != WORKER:
            raise ValueError(f"the command of a rank must begin with PYTHON {' '.join(WORKER)}, got {spec.argv}")
        self.spec = spec
        self.ranks: list[Rank] = []
        self.wake: SimpleQueue[object] = SimpleQueue()
        self.stream: TextIO = sys.stderr if spec.live_on_stderr else sys.stdout
        self.server: subprocess.Popen[bytes] | None = None
        self.listener: threading.Thread | None = None
        self.tee: Tee | None = None

    def start(self, env: Mapping[str, str]) -> None:
        """Start every rank.

        A listening socket holds the port of the rendezvous from here until rank 0 serves it, so that no other program
        can take it and no rank can come too early.
        """
        self.ranks, self.server, self.listener, self.tee = [], None, None, None
        common = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        for name in (STORE_FD, TERMINAL):
            common.pop(name, None)
        common |= {**env, **self.spec.env}
        with ExitStack() as theirs:  # descriptors that only the ranks need
            store = theirs.enter_context(socket.create_server((HOST, 0), backlog=max(128, self.spec.ranks)))
            logs = [theirs.enter_context(open(self.spec.log_path(r), "ab")) for r in range(self.spec.ranks)]
            ours, line = socket.socketpair()
            theirs.enter_context(line)
            reading, writing = os.pipe()
            theirs.callback(os.close, writing)
            widen(reading)
            places = self._places(store, writing, [log.fileno() for log in logs])
            order = Order(os.getpid(), self.spec.argv, self.spec.preload, places)
            try:
                fds = [line.fileno(), *order.descriptors()]
                self.server = start_server(command(fds[0], self.spec.argv), common, logs[0].fileno(), fds)
            except BaseException:
                ours.close()
                os.close(reading)
                raise
        self.ranks = [Rank(rank) for rank in range(self.spec.ranks)]
        self.tee = Tee(os.fdopen(reading, "rb"), self.spec.log_path(0), self.stream)
        about = (ours, order, self.server, self.ranks)
        self.listener = threading.Thread(target=self._hear, args=about, name="forkserver", daemon=True)
        self.listener.start()

    def _places(self, store: socket.socket, pipe: int, logs: Sequence[int]) -> tuple[Place, ...]:
        """Return the environment and descriptors of each rank; rank 0 gets the pipe and the store's socket."""
        places = []
        for rank, log in enumerate(logs):
            env = self.spec.rank_env(rank, HOST, store.getsockname()[1])
            if rank:
                places.append(Place(env, log, log))
                continue
            env[STORE_FD] = str(store.fileno())
            if self.stream.isatty():
                env[TERMINAL] = str(shutil.get_terminal_size().columns)
            places.append(Place(env, pipe, log, (store.fileno(),)))
        return tuple(places)

    def _hear(self, line: socket.socket, order: Order, server: subprocess.Popen[bytes], ranks: Sequence[Rank]) -> None:
        """Send the order and note what the fork server reports of `ranks` until it ends; run as a thread."""
        try:
            with line, suppress(OSError, ValueError), line.makefile("rb") as heard:
                line.sendall(order.line())
                for text in heard:
                    said = json.loads(text)
                    rank = ranks[said["rank"]]
                    if "pid" in said:
                        rank.pid = said["pid"]
                        continue
                    rank.ended(said["code"], said["at"])
                    line.sendall(b"\n")
                    self.wake.put(rank)
        finally:
            self._lose([rank for rank in ranks if rank.code is None], server.wait())

    def _lose(self, left: Sequence[Rank], code: int) -> None:
        """End the ranks that the fork server left behind when it ended with `code` before them."""
        at = time.time()
        for rank in left:
            rank.signal(signal.SIGKILL)
        deadline = time.monotonic() + GONE_S
        while any(rank.is_there() for rank in left) and time.monotonic() < deadline:
            time.sleep(0.01)
        for rank in left:
            rank.ended(code or 1, at, f"the fork server ended: {how(code)}" if rank.pid is not None else "")
        if left:
            self.wake.put(self)

    def running(self) -> bool:
        """Return whether any rank still runs."""
        return bool(self._running())

    def failures(self) -> list[Failure]:
        """Return the ranks that ended with another exit code than 0, in order."""
        return [
            Failure(r.rank, r.code, r.how(), r.failed_at(self.spec.error_path(r.rank))) for r in self.ranks if r.code
        ]

    def code(self) -> int:
        """Return the largest exit code or signal number of the ranks."""
        return max((abs(r.code or 0) for r in self.ranks), default=0)

    def where(self) -> str:
        """Return empty text: there is no output besides the ranks'."""
        return ""

    def end(self, hurried: Callable[[], bool] = lambda: False) -> None:
        """End all running ranks: SIGTERM, then SIGKILL after a while or when `hurried`; return when all are gone."""
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + (SAVING_TERM_S if self.spec.saves else TERM_S)
        while self._running() and time.monotonic() < deadline and not hurried():
            time.sleep(0.02)
        self._signal_all(signal.SIGKILL)
        deadline = time.monotonic() + GONE_S
        while self._running():
            if self.server is not None and time.monotonic() > deadline:
                self.server.kill()  # it does not report (it may be stopped); `_lose` does the rest
            time.sleep(0.01)
        if self.listener is not None:
            self.listener.join()
        if self.tee is not None:
            self.tee.close()

    def _signal_all(self, number: int) -> None:
        running = self._running()
        if self.server is not None and any(rank.pid is None for rank in running):
            self.server.kill()  # not all ranks have started, so there is nothing to save
        for rank in running:
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
    """Run `spec` on this machine; return 0, the failed rank's 2 or 75, 1 for any other failure, or 128 + signal."""
    if spec.nodes != 1:
        raise ValueError(f"launch_local starts the ranks of one node, got {spec.nodes} nodes")
    return supervise(spec, LocalRanks(spec), HOST)
