"""Entry of a rank's process: `python -m launch.rank.worker TARGET ARGS...`, TARGET a module or a .py file.

Ties the process to its launcher, finds out which rank it is, says hello to the launcher's watch with what it found on
its node, and runs TARGET in the same process as `python -m TARGET ARGS...` would. Without the tie, a rank whose
launcher was killed would keep training unnoticed and hold its memory and GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_gpt.awake import AwakeClock
from dist_gpt.protocol import (
    BAD_INPUT,
    ERROR_FILE,
    LAUNCHER_PID,
    LOG_DIR,
    MAX_ERROR,
    PREEMPTED,
    STARTER,
    WATCH,
    WATCH_FD,
    WATCH_TOKEN,
)

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
POLL_S = 1.0
CONNECT_S = 20.0
GO_S = 600.0
"""Longest wait in seconds for the launcher's command; the launcher waits for the other ranks itself."""
LOOK_S = 0.5


def tie_to_parent(parent: int) -> None:
    """Make this process die with process `parent`, its parent: by the kernel on Linux, elsewhere by polling."""
    if not (sys.platform.startswith("linux") and _kernel_kills_us()):
        threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)


def name_process(name: str) -> None:
    """Show `name` for this process in `ps -o comm` and `top`, where the system can do that.

    It must not contain a space: Slurm's proctrack/linuxproc reads /proc/PID/stat word by word, would not find the
    process among those of its step, and could not kill it while it is stopped.
    """
    if sys.platform.startswith("linux"):
        _prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()))


def _kernel_kills_us() -> bool:
    return _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _prctl(option: int, value: object) -> bool:
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def take_place(environ: MutableMapping[str, str]) -> str:
    """Put torchrun's variables of this rank into `environ`, whatever started it; return the sentence that says so."""
    from launch.rank.discover import discover

    if environ.get(STARTER) == "mpi":
        from launch.starters.mpi import meet

        place = meet()
    else:
        place = discover(environ)
    environ.update(place.environ())
    return place.sentence()


def open_log(environ: MutableMapping[str, str]) -> None:
    """Send standard output and error to this rank's log if srun, torchrun or mpirun has started it."""
    folder = environ.get(LOG_DIR)
    if folder is None:
        return
    rank = environ.get("RANK", "0")
    try:
        log = os.open(Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        return  # run directory missing or not writable here: preflight says so, the starter's log shows the rest
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    environ.setdefault(ERROR_FILE, str(Path(folder) / f"rank{rank}.error.json"))


def greet(environ: MutableMapping[str, str]) -> None:
    """Say hello to the watch and wait until it lets this rank start; the socket stays open for heartbeats."""
    if WATCH not in environ:
        return
    from launch.rank.node_info import facts

    found = facts(environ)  # may take long (drivers, name services); the watch waits for a hello, not for this
    host, _, port = environ[WATCH].rpartition(":")
    try:
        line = socket.create_connection((host, int(port)), timeout=CONNECT_S)
    except OSError as error:
        text = (
            f"rank {environ.get('RANK', '0')} on {socket.gethostname()} cannot reach the launcher at {host}:{port}: "
            f"{error}. Check the network between the two hosts, and launch.interface"
        )
        write_down(environ, text)  # the launcher reads it if they share a file system
        sys.exit(text)
    hello = {
        "token": environ.get(WATCH_TOKEN, ""),
        "rank": int(environ.get("RANK", "0")),
        "world": int(environ.get("WORLD_SIZE", "1")),
        "local_rank": int(environ.get("LOCAL_RANK", "0")),
        "local_world": int(environ.get("LOCAL_WORLD_SIZE", "1")),
        "node": int(environ.get("GROUP_RANK", "0")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "facts": {**found, "time": time.time()},  # compared with the launcher's on arrival
    }
    line.sendall(json.dumps({"hello": hello}).encode() + b"\n")
    word = _word(line)
    if word.get("do") != "go":
        sys.stderr.write(f"the launcher did not let this rank start: {word.get('why', 'it is gone')}\n")
        sys.stderr.flush()
        os._exit(BAD_INPUT)
    line.settimeout(None)
    os.set_inheritable(line.fileno(), False)
    environ[WATCH_FD] = str(line.detach())


def _word(line: socket.socket) -> dict[str, Any]:
    """Return the launcher's first command; {} if none comes within GO_S, not counting suspensions of this process.

    It is read byte by byte, as what follows belongs to the pulse.
    """
    clock = AwakeClock()
    end = clock.now() + GO_S
    line.settimeout(LOOK_S)
    text = b""
    while clock.now() < end:
        try:
            byte = line.recv(1)
        except TimeoutError:
            continue
        except OSError:
            break
        if not byte:
            break
        text += byte
        if byte == b"\n":
            with suppress(ValueError):
                word: dict[str, Any] = json.loads(text)
                if word.get("do") in ("go", "leave"):
                    return word
            text = b""
    return {}


def main(argv: list[str]) -> None:
    """Run `argv` = [TARGET, ARGS...] and exit as TARGET does; print its error, if any, and exit with 1."""
    if not argv:
        sys.exit("usage: python -m launch.rank.worker MODULE|FILE.py [ARGS...]")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request to save that comes before there is anything to save
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is not None:
        tie_to_parent(os.getppid() if launcher == "parent" else int(launcher))
    from dist_gpt.config.errors import ConfigError

    try:
        sentence = take_place(os.environ)
        name_process(f"rank{os.environ.get('RANK', '0')}")
        open_log(os.environ)
        if LOG_DIR in os.environ and os.environ.get("LOCAL_RANK") == "0":
            print(sentence, flush=True)
        greet(os.environ)
    except ConfigError as error:
        print(f"dist-gpt: {error}", file=sys.stderr, flush=True)
        write_down(os.environ, str(error))
        sys.exit(BAD_INPUT)
    sys.argv = list(argv)
    code: object = 1
    why = ""
    try:
        if argv[0].endswith(".py"):
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code
        raise
    except KeyboardInterrupt:
        why = "KeyboardInterrupt"
        raise
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
        print(told(error), file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    finally:
        say_bye(os.environ, code, why)
        gc.freeze()  # the process ends: searching all of torch's objects for garbage would take a second


ENTRY = (
    "/launch/starters/forkserver.py", "/launch/rank/worker.py", "/dist_gpt/cli.py", "/dist_gpt/__main__.py", "/typer/",
    "/click/", "runpy",
)  # fmt: skip
"""Files whose frames lead from the start of this process to the program and say nothing about the error."""
EXPLAINED = ("ConfigError", "RendezvousError", "DivergedError")
"""Errors of ours whose text says what to do; a traceback would not help."""


def told(error: BaseException) -> str:
    """Return an error for a rank's log: its text if that explains it, else the traceback from the entry on."""
    ours = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("dist_gpt.")}
    if ours.intersection(EXPLAINED):
        return f"dist-gpt: {error}"
    whole = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = whole
    while one is not None:
        entry = [at for at, frame in enumerate(one.stack) if any(part in frame.filename for part in ENTRY)]
        if entry and entry[-1] + 1 < len(one.stack):
            del one.stack[: entry[-1] + 1]
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "".join(whole.format()).rstrip()


def write_down(environ: MutableMapping[str, str], text: str) -> None:
    """Write the error where the launcher looks, as far as this process can tell which rank it was to be."""
    path = environ.get(ERROR_FILE)
    if path is None and LOG_DIR in environ:
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
        rank = next((environ[name] for name in names if environ.get(name, "").isdecimal()), "0")
        path = str(Path(environ[LOG_DIR]) / f"rank{rank}.error.json")
    if path is not None:
        with suppress(OSError), open(path, "x") as file:
            json.dump({"time": time.time(), "error": text}, file)


def say_bye(environ: MutableMapping[str, str], code: object, why: str = "") -> None:
    """Tell the watch how this rank exits, if its program had no heartbeat of its own.

    Otherwise dist_gpt.train.heartbeat has taken the socket over. A bad end before that is a failure like any other.
    """
    number = environ.pop(WATCH_FD, None)
    if number is None:
        return
    status = code if isinstance(code, int) else 0 if code is None else 1
    why = code if isinstance(code, str) else why  # sys.exit("text")
    said: dict[str, Any] = {"bye": {"code": status}}
    if status not in (0, PREEMPTED):
        text = f"exited with code {status}" + (f": {why}" if why else "")
        said = {"failed": {"error": text[:MAX_ERROR], "inside": False, "position": None, "code": status}}
    with suppress(OSError), socket.socket(fileno=int(number)) as line:
        line.sendall(json.dumps(said).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
