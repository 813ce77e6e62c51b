"""Commands that begin with everything imported, forked from one process: `python -m tests.ranks.preloaded FD`.

Importing torch takes seconds of a processor, and a test run starts hundreds of commands. The nursery, one for each
process of pytest, imports it once. A command runs in a fork of it as `python -m MODULE ARGUMENTS` would, and finds the
fork server of its ranks prepared in the same way. Tests of how a process starts use one that is executed.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from launch import forkserver, local
from launch.spec import WORKER

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "dist_gpt.cli", "dist_gpt.train", "dist_gpt.report.write", "dist_gpt.report.page", "launch.run", "launch.verify",
    "torch.distributed.run", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
)  # fmt: skip
"""What commands need, as far as it starts no thread."""
FIRST_FD = 512
"""This module keeps its descriptors from here on, out of the way of those that a fork server is told by number."""
MOST_FDS = 200
LENGTH = 8
"""Bytes of the number that precedes a document."""
START_S = 120.0


class Started:
    """A command that was forked, with what tests use of subprocess.Popen."""

    def __init__(self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        self.line, theirs = socket.socketpair()
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout: IO[str] = os.fdopen(out)
        self.stderr: IO[str] = os.fdopen(err)
        document = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        send(nursery(), document, [theirs.fileno(), out_end, err_end])
        theirs.close()
        os.close(out_end)
        os.close(err_end)
        self.read: dict[IO[str], str] = {}
        self.readers = [threading.Thread(target=self._read, args=(one,), daemon=True)
                        for one in (self.stdout, self.stderr)]  # fmt: skip
        self.line.settimeout(START_S)
        self.pid = int.from_bytes(self.line.recv(LENGTH), "big")
        assert self.pid, "the nursery has ended"

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, of a killed command minus its signal; subprocess.TimeoutExpired after `timeout` s."""
        if self.returncode is None:
            self.line.settimeout(timeout)
            try:
                said = self.line.recv(LENGTH)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = int.from_bytes(said, "big", signed=True)
            self.line.close()  # from now on its process number may be another's
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the command, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return what is left of both streams, to their ends.

        subprocess.TimeoutExpired after `timeout` s; a later call loses nothing of what has been read.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        for reader in self.readers:
            if reader.ident is None:
                reader.start()
        for reader in self.readers:
            reader.join(None if ends is None else max(0.0, ends - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if ends is None else max(0.0, ends - time.monotonic()))
        return self.read[self.stdout], self.read[self.stderr]

    def _read(self, stream: IO[str]) -> None:
        self.read[stream] = stream.read()


@cache
def nursery() -> socket.socket:
    """Return the connection to this process's nursery; it is started at the first call and ends with this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return ours


def send(line: socket.socket, document: Mapping[str, object], fds: Sequence[int]) -> None:
    """Send a document and descriptors."""
    text = json.dumps(document).encode()
    socket.send_fds(line, [len(text).to_bytes(LENGTH, "big")], fds)
    line.sendall(text)


def receive(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next document and its descriptors, moved to FIRST_FD or above; None when there will be none."""
    head, fds, _, _ = socket.recv_fds(line, LENGTH, MOST_FDS)
    if not head:
        return None
    text = line.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return json.loads(text), [moved(fd) for fd in fds]


def moved(fd: int) -> int:
    """Give a descriptor a number of FIRST_FD or above."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FD)
    os.close(fd)
    return high


# --- in the nursery and its forks ------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Fork a process for each command that is asked for; in such a process, return when its command has ended."""
    assert forkserver.preload(MODULES), "a module starts a thread, which a fork would not have"
    line = socket.socket(fileno=moved(fd))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while (asked := receive(line)) is not None:
        document, fds = asked
        if os.fork() == 0:
            line.close()
            mind(fds[0])
            run(**document, out=fds[1], err=fds[2])
            return
        for one in fds:
            os.close(one)
    os._exit(0)


def mind(fd: int) -> None:
    """Return in a fork of this process, which stays to say on socket `fd` which process that is and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(fd)
        os.setsid()
        return
    os.closerange(1, fd)  # the ends of the command's streams, among others: it alone is to hold them
    os.closerange(fd + 1, os.sysconf("SC_OPEN_MAX"))
    with socket.socket(fileno=fd) as told, suppress(OSError):
        told.sendall(pid.to_bytes(LENGTH, "big"))
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        told.sendall(code.to_bytes(LENGTH, "big", signed=True))
        told.recv(1)  # until it has been read: so long the process number stays the command's
    os._exit(0)


def run(module: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], out: int, err: int) -> None:
    """Run a command in this process as `python -m MODULE ARGUMENTS`."""
    os.chdir(cwd)
    take_over(env, {1: out, 2: err})
    local.start_server = prepared_server()
    sys.modules.pop(module, None)  # it is run, not imported
    sys.path[0] = cwd
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def take_over(env: Mapping[str, str], fds: Mapping[int, int]) -> None:
    """Make an environment and descriptors, by the number that they are to have, those of this process."""
    os.environ.clear()
    os.environ.update(env)
    for number, fd in fds.items():
        os.dup2(fd, number)
    for fd in set(fds.values()):
        os.close(fd)


def prepared_server() -> Callable[..., Any]:
    """Fork a process that waits to become a fork server; return what starts it in place of launch.local.start_server.

    It serves one attempt of a launch. Those that follow execute a fork server, as launches do.
    """
    ours, theirs = (socket.socket(fileno=moved(end.detach())) for end in socket.socketpair())
    pid = os.fork()
    if pid == 0:
        ours.close()
        asked = receive(theirs)
        theirs.close()
        if asked is None:
            os._exit(0)
        document, fds = asked
        os.setsid()
        os.chdir(document["cwd"])
        take_over(document["env"], dict(zip([2, *document["fds"]], fds, strict=True)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.modules.pop(document["argv"][1 + len(WORKER)], None)  # the ranks run it
        forkserver.main(document["argv"])
        sys.exit()
    theirs.close()
    unused, start_server = [Server(pid)], local.start_server

    def start(argv: Sequence[str], env: Mapping[str, str], log: int, fds: Sequence[int]) -> Any:
        if not unused:
            return start_server(argv, env, log, fds)
        document = {"cwd": os.getcwd(), "env": dict(env), "fds": list(fds), "argv": list(argv[3:])}
        send(ours, document, [log, *fds])
        return unused.pop()

    return start


class Server:
    """A fork server that was forked, with what launch.local uses of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.lock = threading.Lock()
        self.ended = False

    def wait(self) -> int:
        """Wait for its end; return its exit code, minus the signal where it was killed."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self.lock:
            self.ended = True
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        with self.lock:
            if not self.ended:
                os.kill(self.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
