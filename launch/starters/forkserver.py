"""Fork the ranks of this machine from one process: `python -m launch.starters.forkserver FD RANK'S COMMAND...`.

Importing torch takes seconds of CPU time, and longer if Python is on a network file system. The fork server imports it
once, and every rank starts with it: 8 ranks cost one import, not 8. It reads an Order from the socket FD, forks a
process for each rank, and reports on the socket the PID of each rank and how it ended. An ended process is reaped only
when the launcher has heard of it: until then its PID cannot be reused.

A rank runs in the forked process only if that is safe: on Linux and with no other thread running. Otherwise its command
is executed anew.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, BinaryIO

import psutil

from dist_gpt.protocol import LAUNCHER_PID, STARTED
from launch.rank import worker
from launch.spec import WORKER

Handler = Callable[[int, FrameType | None], Any] | int | None
FOR_RANKS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask ranks to save or to end, often sent to all processes of a job. The fork server ignores them, as its
end would kill the ranks before they have saved."""
NUMPY_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class Place:
    """Environment and descriptors of one rank's process; the descriptors are the fork server's."""

    env: dict[str, str]
    """Variables to set."""
    out: int
    err: int
    kept: tuple[int, ...] = ()
    """Further descriptors that the rank inherits."""


@dataclass(frozen=True)
class Order:
    """Order to the fork server: what it starts."""

    launcher: int
    """PID of the process that it must not outlive."""
    argv: tuple[str, ...]
    """Command of every rank: the interpreter, WORKER, a program and its arguments."""
    preload: tuple[str, ...]
    """Modules to import before the first fork."""
    places: tuple[Place, ...]
    """One for each rank, in order."""

    def line(self) -> bytes:
        """Return the order as it is sent: one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def of(line: bytes) -> Order:
        """Return the order that was sent as `line`."""
        sent = json.loads(line)
        places = tuple(Place(p["env"], p["out"], p["err"], tuple(p["kept"])) for p in sent["places"])
        return Order(sent["launcher"], tuple(sent["argv"]), tuple(sent["preload"]), places)

    def descriptors(self) -> set[int]:
        """Return every descriptor that is meant for ranks."""
        return {fd for place in self.places for fd in (place.out, place.err, *place.kept)}


def command(fd: int, argv: Sequence[str]) -> list[str]:
    """Return the fork server's command. It includes the rank's, so that `ps` and `pgrep -f` find the ranks by it."""
    return [argv[0], "-m", "launch.starters.forkserver", str(fd), *argv[1:]]


def main(argv: Sequence[str]) -> None:
    """Carry out the order read from descriptor argv[0]; in a forked rank, run its program."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in FOR_RANKS}
    with socket.socket(fileno=int(argv[0])) as line, line.makefile("rb") as heard:
        line.set_inheritable(False)
        order = Order.of(heard.readline())
        worker.tie_to_parent(order.launcher)
        in_place = sys.platform == "linux" and preload(order.preload)
        ranks: dict[int, int] = {}  # by PID
        place = next((place for place in order.places if fork(line, ranks, before)), None)
        if place is None:
            for fd in order.descriptors():
                os.close(fd)
            follow(ranks, line, heard)
            os._exit(0)  # at once: no imported module needs an orderly end
    become(order, place, in_place)


def preload(modules: Sequence[str]) -> bool:
    """Import what the ranks will need; return whether they may run in a fork of this process."""
    if modules and NUMPY_THREADS not in os.environ:
        os.environ[NUMPY_THREADS] = "1"  # numpy starts as many threads as OMP_NUM_THREADS says when it is imported
        with suppress(ImportError):
            importlib.import_module("numpy")
        del os.environ[NUMPY_THREADS]  # torch may read it, too
    for module in modules:
        with suppress(Exception):  # each rank reports the error in its own log
            importlib.import_module(module)
    gc.freeze()  # what was imported is never garbage, and pages that no collector touches stay shared
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        print(f"ranks import torch one by one: a module that they need has started a thread ({threads} are running)",
              file=sys.stderr, flush=True)  # fmt: skip
    return threads == 1


def fork(line: socket.socket, ranks: dict[int, int], before: Mapping[signal.Signals, Handler]) -> bool:
    """Fork the process of the next rank and report it; return whether this is that process.

    `before`: signal handlers of the rank until its program sets others.
    """
    server = os.getpid()
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads run: the rank will exec its command
        pid = os.fork()
    if pid == 0:
        os.setsid()  # children of the rank get the signals meant for the rank
        if sys.platform == "linux":
            worker.tie_to_parent(server)
        os.environ |= {LAUNCHER_PID: str(server), STARTED: str(psutil.Process(server).create_time())}
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        os.close(writing)
        os.close(reading)
        return True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
    os.close(writing)
    os.read(reading, 1)  # returns when the rank has its session or has died
    os.close(reading)
    tell(line, {"rank": len(ranks), "pid": pid})
    ranks[pid] = len(ranks)
    return False


def follow(ranks: dict[int, int], line: socket.socket, heard: BinaryIO) -> None:
    """Report how each rank ended, until all have."""
    while ranks:
        pid, code = next_ended()
        at = time.time()
        if pid not in ranks:  # started by an imported module
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # processes that the rank left running
        tell(line, {"rank": ranks.pop(pid), "code": code, "at": at})
        if not heard.readline():  # the launcher is gone
            os._exit(1)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def next_ended() -> tuple[int, int]:
    """Return the PID and exit code of an ended process, without reaping it if the system can do that."""
    if not hasattr(os, "waitid"):
        pid, status = os.wait()
        return pid, os.waitstatus_to_exitcode(status)
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    if found is None:
        raise ChildProcessError("a rank's process disappeared without an exit status")
    return found.si_pid, found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def tell(line: socket.socket, said: dict[str, float]) -> None:
    """Send one line to the launcher."""
    with suppress(OSError):  # the launcher is gone, and this process soon will be
        line.sendall(json.dumps(said).encode() + b"\n")


def become(order: Order, place: Place, in_place: bool) -> None:
    """Make this forked process the rank at `place`: run its program here if `in_place`, or execute its command anew."""
    os.dup2(place.out, 1)
    os.dup2(place.err, 2)
    for fd in order.descriptors() - {1, 2, *place.kept}:
        os.close(fd)
    os.environ.update(place.env)
    if in_place:
        worker.main(list(order.argv[1 + len(WORKER) :]))
        return
    for fd in place.kept:
        os.set_inheritable(fd, True)
    os.execv(order.argv[0], order.argv)


if __name__ == "__main__":
    main(sys.argv[1:])
