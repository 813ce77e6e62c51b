"""Keep a run directory to one training at a time.

RUN_DIR/launcher.lock holds {host, pid, job, ...} as JSON while a launcher supervises ranks there, or while rank 0 of a
training without a launcher trains.

    lock.look(run_dir)                # raises ConfigError if another training is there
    with lock.hold(run_dir): ...      # the same, and keeps other trainings out

The file is made by O_EXCL and touched every TOUCH_S by a thread, so that a launcher that was killed, here or on another
host, holds nobody up: ages are by the clock of the file system alone, which all hosts share.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from dist_gpt.config.errors import ConfigError

FILE = "launcher.lock"
TOUCH_S = 5.0
STALE_S = 30.0
SAME_S = 1.0
"""Start times of one process, as psutil computes them, differ by less."""


def look(run_dir: Path) -> None:
    """Raise ConfigError, which names host, process and job, if another training is using `run_dir`."""
    holder = _holder(run_dir / FILE)
    if holder is None:
        return
    host, pid, job = (holder.get(key) for key in ("host", "pid", "job"))
    who = f"process {pid} on {host}" if pid else "one that is just starting"
    end = f"scancel {job}" if job else f"kill {pid} on {host}"
    raise ConfigError([
        f"run_dir: {run_dir} is in use by another training, {who}{f', Slurm job {job}' if job else ''}; wait for its "
        f"end, or end it ({end}), or choose another run_dir. If it is gone for certain, remove {run_dir / FILE}"
    ])  # fmt: skip


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of `run_dir`, which must exist. Raise ConfigError if one is using it."""
    path, own = run_dir / FILE, json.dumps(_ours()).encode()
    descriptor, done = _take(path, own), threading.Event()
    threading.Thread(target=_touch, args=(descriptor, done), name="lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with suppress(OSError):  # the run directory may be gone
            if path.read_bytes() == own:
                path.unlink()


def _ours() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "token": secrets.token_hex(8),
    }


def _take(path: Path, own: bytes) -> int:
    """The new lock, open. ConfigError where there is another's."""
    try:
        while True:
            with suppress(FileExistsError):
                return _new(path, own)
            look(path.parent)
            descriptor = _take_over(path, own)
            if descriptor is not None:
                return descriptor
            time.sleep(0.02)
    except OSError as error:
        raise ConfigError([f"run_dir: cannot write {error.filename or path}: {error.strerror}"]) from error


def _new(path: Path, content: bytes) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(descriptor, content)
    return descriptor


def _take_over(path: Path, own: bytes) -> int | None:
    """Put ours into the place of a lock that nobody holds; None: somebody else was faster, or it is gone.

    Who may replace this very lock is settled by a file named after what it holds; there is never none in its place.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    claim = path.with_name(f".{path.name}.over-{hashlib.sha256(text).hexdigest()[:16]}")
    try:
        os.close(_new(claim, b""))
    except FileExistsError:
        with suppress(FileNotFoundError):
            if _now(path.parent) - claim.stat().st_mtime > STALE_S:  # died in between
                claim.unlink()
        return None
    try:
        if _holder(path) is not None or path.read_bytes() != text:
            return None
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = _new(beside, own)
        os.rename(beside, path)
        return descriptor
    except FileNotFoundError:
        return None
    finally:
        claim.unlink(missing_ok=True)


def _touch(descriptor: int, done: threading.Event) -> None:
    """The file that was made, whatever it is called by now."""
    while not done.wait(TOUCH_S):
        with suppress(OSError):
            os.utime(descriptor)
    os.close(descriptor)


def _holder(path: Path) -> dict[str, Any] | None:
    """What the lock says, where somebody holds it."""
    try:
        with open(path, "rb") as file:  # opening asks a network file system for how it is now
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    holder: dict[str, Any] = {}
    with suppress(ValueError, TypeError):  # empty: it is being written
        holder = dict(json.loads(text))
    ours = _ours()
    if holder.get("host") == ours["host"]:
        process = _process(holder)
        if process is not None:
            return holder if process else None
    if ours["job"] is not None and holder.get("job") == ours["job"] and holder.get("restarts") != ours["restarts"]:
        return None  # Slurm has started our job again: its launcher of before is gone
    return holder if _now(path.parent) - touched < STALE_S else None


def _process(holder: dict[str, Any]) -> bool | None:
    """Whether a process of this host is alive; None: there is one of that number, and it may be another one."""
    try:
        process = psutil.Process(int(holder["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return True if abs(process.create_time() - float(holder["began"])) < SAME_S else None
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, KeyError, ValueError, TypeError):
        return None


def _now(folder: Path) -> float:
    """The time by the clock that the folder's files are stamped with."""
    path = folder / f".{FILE}.{secrets.token_hex(4)}"
    try:
        with open(path, "xb") as file:
            file.write(b"\n")  # some file systems stamp what is written, not what is made
            file.flush()
            now = os.fstat(file.fileno()).st_mtime
        path.unlink()
        return now
    except OSError:  # not to be written into: whoever only looks shall not fail for that
        return time.time()
