"""Commands that begin with everything imported, forked from one process: `python -m tests.ranks.preloaded FD`.

Importing torch takes seconds of a processor, and a test run starts hundreds of commands. The nursery, one for each
process of pytest, imports it once. A command runs in a fork of it as `python -m MODULE ARGUMENTS` would, and finds the
fork server of its ranks prepared in the same way. Tests of how a process starts use one that is executed.
"""

from __future__ import annotations

import atexit
import fcntl
import io
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
from typing import IO, Any, NoReturn

import numpy

from launch.rank.worker import name_process, tie_to_parent
from launch.spec import WORKER
from launch.starters import command, forkserver, local
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "dist_gpt.cli", "dist_gpt.train.trainer", "dist_gpt.report.write", "dist_gpt.report.render.page",
    "launch.run", "launch.verify",
    "torch.distributed.run", "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
)  # fmt: skip
"""What commands need, as far as it starts no thread."""
TORCHRUN = "torch.distributed.run"
ATTEMPTS = 2
"""Of a launch whose processes are forked; the test runs start their ranks again once."""
FIRST_FD = 512
"""This module keeps its descriptors from here on, out of the way of those that a fork server is told by number."""
MOST_FDS = 200
LENGTH = 8
"""Bytes of the number that precedes a document."""


class Started:
    """A command that was forked, with what tests use of subprocess.Popen."""

    def __init__(self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        self.line, theirs = socket.socketpair()
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout: IO[str] = os.fdopen(out, encoding="utf-8", errors="replace")
        self.stderr: IO[str] = os.fdopen(err, encoding="utf-8", errors="replace")
        document = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        ask(document, [theirs.fileno(), out_end, err_end])
        theirs.close()
        os.close(out_end)
        os.close(err_end)
        self.said: dict[IO[str], list[str]] = {self.stdout: [], self.stderr: []}
        self.readers = [threading.Thread(target=self._read, args=(one,), daemon=True) for one in self.said]
        self.pid = self._number(PATIENCE_S)

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, of a killed command minus its signal; subprocess.TimeoutExpired after `timeout` s."""
        if self.returncode is None:
            self.returncode = self._number(timeout)
            self.line.close()  # from now on its process number may be another's
        return self.returncode

    def _number(self, timeout: float | None) -> int:
        """Return what the process that minds the command says next."""
        self.line.settimeout(timeout)
        try:
            said = self.line.recv(LENGTH)
        except (TimeoutError, BlockingIOError):
            raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        if len(said) != LENGTH:
            raise RuntimeError(f"the process that minds {self.args} has ended before it")
        return int.from_bytes(said, "big", signed=True)

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
        self.read_along()
        for reader in self.readers:
            reader.join(None if ends is None else max(0.0, ends - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if ends is None else max(0.0, ends - time.monotonic()))
        return self.so_far()

    def read_along(self) -> None:
        """Read both streams from now on, so that the command never waits for somebody to read."""
        for reader in self.readers:
            if reader.ident is None:
                reader.start()

    def so_far(self) -> tuple[str, str]:
        """Return what has been read of both streams."""
        return "".join(self.said[self.stdout]), "".join(self.said[self.stderr])

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.said[stream].append(line)


@cache
def nursery() -> socket.socket:
    """Return the connection to this process's nursery; it is started at the first call and ends with this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env=environment(),
        )  # fmt: skip
    return ours


def environment() -> dict[str, str]:
    """This process's, without what a launcher around the tests may have set."""
    ours = ("TORCHELASTIC", "DIST_GPT", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "WANDB_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def ask(document: Mapping[str, object], fds: Sequence[int]) -> None:
    """Send a document to the nursery; to a new one if it has ended."""
    try:
        send(nursery(), document, fds)
    except OSError:
        nursery.cache_clear()
        send(nursery(), document, fds)


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
    """Fork a process for each command that is asked for."""
    before = dict(os.environ)
    assert forkserver.preload(MODULES), "a module starts a thread, which a fork would not have"
    assert set(MODULES) <= set(sys.modules), f"not imported: {set(MODULES) - set(sys.modules)}"
    set_by_imports = {k: v for k, v in os.environ.items() if before.get(k) != v}
    line = socket.socket(fileno=moved(fd))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs in the background
    sys.stdout.flush()  # each fork would write again what an import has written
    while (asked := receive(line)) is not None:
        document, fds = asked
        if os.fork() == 0:
            line.close()
            mind(*fds)
            document["env"] |= set_by_imports
            to_the_end(run, document, fds[1:])
        for one in fds:
            os.close(one)
    os._exit(0)


def mind(fd: int, *streams: int) -> None:
    """Return in a fork of this process, which stays to say on socket `fd` which process that is and how it ended.

    Neither outlives the nursery. The fork alone keeps the descriptors `streams`.
    """
    tie_to_parent(os.getppid())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    minder = os.getpid()
    pid = os.fork()
    if pid == 0:
        tie_to_parent(minder)
        os.close(fd)
        os.setsid()
        return
    for stream in streams:
        os.close(stream)
    with socket.socket(fileno=fd) as told:
        with suppress(OSError):
            told.sendall(pid.to_bytes(LENGTH, "big"))
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with suppress(OSError):
            told.sendall(code.to_bytes(LENGTH, "big", signed=True))
            told.recv(1)  # until it has been read: so long the process number stays the command's
        os.waitpid(pid, 0)
    os._exit(0)


def to_the_end(work: Callable[..., None], *arguments: object) -> NoReturn:
    """Call work(*arguments) and end this process as Python does, but without taking apart what was imported: with
    torch, that takes 0.4 s of a processor."""
    code: object = 0
    try:
        work(*arguments)
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


def run(document: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Run the command that a document describes in this process as `python -m MODULE ARGUMENTS`."""
    take_over(document["cwd"], document["env"], dict(zip((1, 2), streams, strict=True)))
    use_spares(spares(ATTEMPTS))
    program(["-m", document["module"], *document["arguments"]])


def take_over(cwd: str, env: Mapping[str, str], fds: Mapping[int, int]) -> None:
    """Make a folder, an environment, and descriptors by the number that they are to have, those of this process."""
    for number, fd in fds.items():
        os.dup2(fd, number)
    for fd in set(fds.values()):
        os.close(fd)
    assert env.get("PYTHONPATH") == os.environ["PYTHONPATH"], "Python has read it already"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in env)
    numpy.random.seed()  # or every fork would draw the same numbers


def program(words: Sequence[str]) -> None:
    """Run in this process what `python WORDS` runs, to its end: `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`."""
    if words[0] != "-m":
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        return
    module, *arguments = words[1:]
    if module == TORCHRUN:
        fork_ranks(arguments)
    for at, word in enumerate(words):
        if tuple(words[at - 2 : at]) == WORKER or at == 1:
            forget(word)
    sys.path[0] = os.getcwd()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def forget(module: str) -> None:
    """Take back the import of a module that is to be run; a package stays: its `__main__` is run."""
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)


class Spare:
    """A fork of this process, its child, that waits to run another program; with what is used of subprocess.Popen."""

    def __init__(self, others: Sequence[Spare] = ()) -> None:
        """Fork it; it closes its copies of what `others` are spoken to through."""
        self.line, theirs = (socket.socket(fileno=moved(end.detach())) for end in socket.socketpair())
        self.lock = threading.Lock()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for end in (self.line, *(other.line for other in others)):
                end.close()
            asked = receive(theirs)
            theirs.close()
            if asked is None:
                os._exit(0)
            to_the_end(become, *asked)
        theirs.close()

    def start(self, words: Sequence[str], env: Mapping[str, str], fds: Mapping[int, int], tied: bool = False) -> Spare:
        """Run `python WORDS` in it, in a session of its own, with descriptors `fds` by number. `tied`: it ends with
        this process."""
        document = {"words": list(words), "cwd": os.getcwd(), "env": dict(env), "fds": list(fds), "tied": tied}
        send(self.line, document, list(fds.values()))
        self.line.close()
        return self

    def poll(self) -> int | None:
        """Return the exit code, minus the signal where it was killed, or None while it runs."""
        with self.lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; subprocess.TimeoutExpired after `timeout` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is None:
                with suppress(ChildProcessError):  # another thread has heard of its end
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            else:
                time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def become(document: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Run what was asked of a spare, to its end."""
    os.setsid()
    if document["tied"]:
        tie_to_parent(os.getppid())
    take_over(document["cwd"], document["env"], dict(zip(document["fds"], fds, strict=True)))
    if "RANK" in os.environ:
        name_process(f"rank{os.environ['RANK']}")  # as launch.rank.worker does: tests find it by that
    program(document["words"])


def spares(count: int) -> list[Spare]:
    """Fork so many of them."""
    found: list[Spare] = []
    for _ in range(count):
        found.append(Spare(found))
    return found


def use_spares(left: list[Spare]) -> None:
    """Let the launcher start in one of them, at each attempt, the fork server of its ranks or torchrun.

    When none is left, and for other programs, it starts processes as always.
    """
    execute_server, execute = local.start_server, command.start_process

    def start_server(argv: Sequence[str], env: Mapping[str, str], log: int, fds: Sequence[int]) -> Any:
        if not left:
            return execute_server(argv, env, log, fds)
        with open(os.devnull, "w") as nothing:
            return left.pop().start(argv[1:], env, {1: nothing.fileno(), 2: log, **{fd: fd for fd in fds}})

    def start_process(argv: Sequence[str], env: Mapping[str, str], log: int) -> Any:
        python, *words = argv[4:]  # after `python -m launch.rank.lifeline PID`
        if not left or (python, *words[:2]) != (sys.executable, "-m", TORCHRUN):
            return execute(argv, env, log)
        return left.pop().start(words, env, {1: log, 2: log}, tied=True)

    local.start_server, command.start_process = start_server, start_process


def fork_ranks(arguments: Sequence[str]) -> None:
    """Let torchrun, which is to run in this process with `arguments`, start its ranks in spares."""

    def number(option: str, default: int) -> int:
        return int(arguments[arguments.index(option) + 1]) if option in arguments else default

    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    left = spares(number("--nproc-per-node", 1) * (1 + number("--max-restarts", 0)))
    execute = SubprocessHandler._popen

    def start(handler: Any, args: Sequence[str], env: Mapping[str, str]) -> Any:
        words = [word for word in args[1:] if word != "-u"]
        if args[0] != sys.executable or not left:
            return execute(handler, args, env)
        streams = {1: handler._stdout, 2: handler._stderr}
        fds = {number: stream.fileno() for number, stream in streams.items() if stream}
        return left.pop().start(words, {**env, "PYTHONUNBUFFERED": "1"}, fds)

    SubprocessHandler._popen = start  # type: ignore[method-assign]


if __name__ == "__main__":
    main(int(sys.argv[1]))
