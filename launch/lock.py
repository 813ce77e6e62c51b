"""Keep a run directory to one training run at a time.

RUN_DIR/launcher.lock holds {host, pid, job, ...} as JSON while a launcher supervises ranks there, or while rank 0 of a
run without a launcher trains.

    lock.look(run_dir)                # raises ConfigError if another run is using it
    with lock.hold(run_dir): ...      # the same, and keeps other runs out

The file is created with O_EXCL and touched every TOUCH_S by a thread, so that a launcher that was killed, here or on
another host, blocks no other: ages are measured by the file system's clock alone, which all hosts share.
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
"""Seconds by which psutil's start times of one process differ at most."""


def look(run_dir: Path) -> None:
    """Raise ConfigError, which names host, process and job, if another run is using `run_dir`."""
    holder = _holder(run_dir / FILE)
    if holder is None:
        return
    host, pid, job = (holder.get(key) for key in ("host", "pid", "job"))
    who = f"process {pid} on {host}" if pid else "which is just starting"
    end = f"scancel {job}" if job else f"kill {pid} on {host}"
    raise ConfigError([
        f"run_dir: {run_dir} is in use by another training run, {who}{f', Slurm job {job}' if job else ''}; wait until "
        f"it ends, end it ({end}), or choose another run_dir. If it is certainly gone, remove {run_dir / FILE}"
    ])  # fmt: skip


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of `run_dir`, which must exist. Raise ConfigError if one is using it."""
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
    """Return the descriptor of the new lock. Raise ConfigError if another process holds the lock."""
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
    """Replace a lock that no process holds, and return the descriptor; None if another was faster or the lock is gone.

    A file named after the lock's content decides which process may replace it; the lock is never absent.
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
            if _now(path.parent) - claim.stat().st_mtime > STALE_S:  # its process died in between
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
    """Touch the lock that was made, whatever its name by now, until `done` is set."""
    while not done.wait(TOUCH_S):
        with suppress(OSError):
            os.utime(descriptor)
    os.close(descriptor)


def _holder(path: Path) -> dict[str, Any] | None:
    """Return what the lock says if a process holds it, else None."""
    try:
        with open(path, "rb") as file:  # opening makes a network file system read its current state
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
        return None  # Slurm has restarted our job: its earlier launcher is gone
    return holder if _now(path.parent) - touched < STALE_S else None


def _process(holder: dict[str, Any]) -> bool | None:
    """Return whether the holder, on this host, is alive; None if its PID may be another process's by now."""
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
    """Return the time of the clock that stamps the folder's files."""
    path = folder / f".{FILE}.{secrets.token_hex(4)}"
    try:
        with open(path, "xb") as file:
            file.write(b"\n")  # some file systems stamp files when written, not when created
            file.flush()
            now = os.fstat(file.fileno()).st_mtime
        path.unlink()
        return now
    except OSError:  # the folder is not writable: `look` must not fail for that
        return time.time()
