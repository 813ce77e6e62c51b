"""All ranks of a job as processes of this machine: started, followed, ended together.

`launch_local(spec)` returns the job's exit code. Whatever happens (a rank dies, Ctrl-C, SIGTERM, an error here), no
process of the job is left when it returns; when the launcher itself is killed, `launch.worker` ends the ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TextIO

from launch.spec import LAUNCHER_PID, STORE_FD, TERMINAL, JobSpec
from launch.tee import Tee

HOST = "127.0.0.1"
GRACE_S = 1.0
"""After the first failure: time for the ranks that fail because of it to write their own errors to their logs."""
PREEMPTED, PREEMPTED_GRACE_S = 75, 30.0
"""A rank that was told to leave saved first; the others may still be writing."""
TERM_S = 5.0
"""Between SIGTERM and SIGKILL."""
VIOLENT = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
VIOLENT_LEAD_S = 0.5
"""A killed process closes its connections before its launcher hears of it, so a peer's error can look earlier. Such
deaths are never a consequence of another rank's (SIGABRT is: gloo aborts on a message it did not expect)."""
TAIL_LINES = 20
PASSED_THROUGH = (2, PREEMPTED)


class Rank:
    """One process, its own session, and the thread that waits for it."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], log: Path, log_start: int) -> None:
        self.rank = rank
        self.process = process
        self.log = log
        self.log_start = log_start  # earlier attempts wrote before it
        self.code: int | None = None
        self.ended_at = 0.0  # seconds since 1970
        self.tee: Tee | None = None
        self.lock = threading.Lock()

    def wait(self, ended: SimpleQueue[Rank | None]) -> None:
        """Body of the waiting thread. What the rank started is killed before its id is given back to the system."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            self.ended_at = time.time()
            self.signal(signal.SIGKILL)
        code = self.process.wait()
        with self.lock:
            self.ended_at = self.ended_at or time.time()
            self.code = code
        ended.put(self)

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

    def tail(self) -> list[str]:
        """The last lines of what this attempt logged."""
        with suppress(OSError), open(self.log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_start, size - 64_000))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return []


class LocalJob:
    """The processes of one job."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.ranks: list[Rank] = []
        self.ended: SimpleQueue[Rank | None] = SimpleQueue()  # None: a signal came, look at `stops`
        self.stops: list[int] = []  # signals the launcher received
        self.live: TextIO = sys.stderr if spec.live_on_stderr else sys.stdout

    def on_signal(self, number: int, frame: object) -> None:
        """Signal handler: only notes it (SimpleQueue.put may be called from a handler)."""
        self.stops.append(number)
        self.ended.put(None)

    def start(self) -> None:
        """Start every rank. The port of the rendezvous is held by a listening socket from here until rank 0 serves it,
        so that nobody else can take it and no rank can come too early."""
        self.spec.log_dir.mkdir(parents=True, exist_ok=True)
        with socket.create_server((HOST, 0), backlog=max(128, self.spec.ranks)) as server:
            for rank in range(self.spec.ranks):
                self.ranks.append(self._start_rank(rank, server))
        for started in self.ranks:
            threading.Thread(target=started.wait, args=(self.ended,), name=f"rank{started.rank}", daemon=True).start()

    def _start_rank(self, rank: int, server: socket.socket) -> Rank:
        spec = self.spec
        env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ}
        for name in (STORE_FD, TERMINAL):
            env.pop(name, None)
        env.update(spec.rank_env(rank, HOST, server.getsockname()[1]))
        env[LAUNCHER_PID] = str(os.getpid())
        inherited = []
        if rank == 0:
            inherited = [server.fileno()]
            env[STORE_FD] = str(server.fileno())
            if self.live.isatty():
                env[TERMINAL] = str(shutil.get_terminal_size().columns)
        spec.error_path(rank).unlink(missing_ok=True)
        with open(spec.log_path(rank), "ab") as log:
            process = subprocess.Popen(
                spec.argv, env=env, pass_fds=inherited, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else log, stderr=log, start_new_session=True,
            )  # fmt: skip
            started = Rank(rank, process, spec.log_path(rank), log.tell())
        if process.stdout is not None:
            started.tee = Tee(process.stdout, spec.log_path(rank), self.live)
        return started

    def follow(self) -> int:
        """Wait for the end; returns the job's exit code and says on stderr what went wrong."""
        left = len(self.ranks)
        failed: list[Rank] = []
        deadline = None
        while left and not self.stops:
            try:
                patience = 60.0 if deadline is None else deadline - time.monotonic()
                rank = self.ended.get(timeout=max(0.0, patience))
            except Empty:
                if deadline is None:
                    continue
                break
            if rank is None:
                continue
            left -= 1
            if rank.code:
                failed.append(rank)
                grace = PREEMPTED_GRACE_S if rank.code == PREEMPTED else GRACE_S
                deadline = deadline or time.monotonic() + grace
        if self.stops:
            return self._stopped()
        if not failed:
            return 0
        self.end()
        return self._report(failed)

    def _stopped(self) -> int:
        name = signal.Signals(self.stops[0]).name
        _say(f"{name} received: ending {len(self.ranks)} ranks")
        self.end()
        return 128 + self.stops[0]

    def _report(self, failed: list[Rank]) -> int:
        """Name the rank that failed first, show the end of its log, and return the job's code."""
        first = min(failed, key=lambda r: r.failed_at(self.spec.error_path(r.rank)))
        if first.code == PREEMPTED:
            _say(f"preempted: {self.spec.name(first.rank)} saved and left (exit code {PREEMPTED})")
            return PREEMPTED
        lines = [f"{self.spec.name(first.rank)} died: {first.how()}"]
        if first.code == -signal.SIGKILL:
            lines.append("  (if nobody killed it: the system kills a process with SIGKILL when memory runs out)")
        tail = first.tail()
        lines.append(f"end of {first.log}:" if tail else f"{first.log} is empty")
        lines += [f"  | {line}" for line in tail]
        others = sorted(r.rank for r in failed if r is not first)
        if others:
            lines.append(f"failed after it: rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}")
        _say("\n".join(lines))
        return first.code if first.code in PASSED_THROUGH else 1

    def end(self) -> None:
        """End whatever still runs: SIGTERM, SIGKILL after TERM_S or at a second signal; returns when all are gone."""
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + TERM_S
        stops = len(self.stops)
        while self._running() and time.monotonic() < deadline and len(self.stops) == stops:
            time.sleep(0.02)
        self._signal_all(signal.SIGKILL)
        while self._running():
            time.sleep(0.01)
        for rank in self.ranks:
            if rank.tee is not None:
                rank.tee.close()

    def abandon(self) -> None:
        """End ranks that have no waiting thread yet: the start itself failed."""
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
            rank.code = rank.process.wait()

    def _signal_all(self, number: int) -> None:
        for rank in self._running():
            rank.signal(number)

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]


@contextmanager
def _handled(job: LocalJob) -> Iterator[None]:
    """Route the signals that ask the launcher to leave to the job; ignored ones stay ignored (nohup, `&`)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, job.on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def launch_local(spec: JobSpec) -> int:
    """Run `spec` on this machine; returns 0, the failed rank's 2 or 75, 1 for any other failure, 128 + signal."""
    if spec.nodes != 1:
        raise ValueError(f"launch_local starts one node, got {spec.nodes}")
    job = LocalJob(spec)
    with _handled(job):
        try:
            job.start()
        except BaseException:
            job.abandon()
            raise
        try:
            return job.follow()
        finally:
            job.end()
