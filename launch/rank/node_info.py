"""Collect what a rank finds on its node before torch is imported: `facts(environ)`, JSON for monitor.preflight."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from dist_gpt.protocol import CONFIG_HASH, RUN_DIR, STORE_FD, WATCH

RESOLVE_S = 3.0
TOOL_S = 20.0
KFD = Path("/sys/class/kfd/kfd/topology/nodes")
"""Where the kernel lists AMD's GPUs; those that a job may not use cannot be read there."""
ROOT = Path(__file__).resolve().parents[2]


def facts(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what this rank finds on its node. Never raises: a missing fact is empty or says why under `error`."""
    interfaces = interface_addresses()
    name, run_dir = environ.get("MASTER_ADDR"), environ.get(RUN_DIR)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {
        "hostname": socket.gethostname(),
        "interfaces": interfaces,
        "towards_watch": address_towards(environ.get(WATCH, "")),
        "named_interfaces": _words(environ.get("GLOO_SOCKET_IFNAME", "")),
        "master": {"name": name, "port": environ.get("MASTER_PORT", ""), **resolve(name)} if name else {},
        "port_free": _own_port_free(environ),
        "cores": cores,
        "machine_cores": os.cpu_count() or 1,
        "slurm": "SLURM_JOB_ID" in environ,
        "gpus": visible_gpus(environ),
        "versions": versions(),
        "code": code_digest(ROOT),
        "config": config_digest(Path(run_dir) / "config.yaml") if run_dir else "",
        "config_expected": environ.get(CONFIG_HASH, ""),
        "run_dir": folder(Path(run_dir)) if run_dir else {},
        "time": time.time(),  # last: the launcher compares it with its own on arrival
    }


def interface_addresses() -> dict[str, list[str]]:
    """Return the IP addresses of each network interface that is up."""
    try:
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        found = {name: addresses for name, addresses in psutil.net_if_addrs().items() if name in up}
    except (OSError, psutil.Error):
        return {}
    ip = (socket.AF_INET, socket.AF_INET6)
    return {name: [a.address.split("%")[0] for a in addresses if a.family in ip] for name, addresses in found.items()}


def address_towards(watch: str) -> str:
    """Return this machine's address on the route to `host:port`; connecting the datagram socket sends nothing."""
    host, _, port = watch.rpartition(":")
    if not host or not port.isdigit():
        return ""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect((host.strip("[]"), int(port)))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def resolve(name: str, patience_s: float = RESOLVE_S) -> dict[str, Any]:
    """Return the `addresses` of a host name, or an `error`; wait at most `patience_s` seconds for the name server."""
    found: dict[str, Any] = {"error": f"no answer from the name service in {patience_s:g} s"}

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            found["error"] = str(error)
        else:
            found["addresses"] = sorted({str(answer[4][0]) for answer in answers})

    thread = Thread(target=ask, name="resolver", daemon=True)
    thread.start()
    thread.join(patience_s)
    return {"addresses": found["addresses"]} if "addresses" in found else {"error": found["error"]}


def port_free(addr: str, port: int) -> bool:
    """Return whether this machine could listen on `addr`:`port` now; True if `addr` is not one of its addresses."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(addr, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)  # with SO_REUSEADDR two may bind, only one may listen
    except OSError as error:
        return error.errno not in (98, 48)  # in use (Linux, macOS)
    return True


def _own_port_free(environ: Mapping[str, str]) -> bool | None:
    """Return whether MASTER_PORT is free; None if this rank will not listen on it or its socket listens already."""
    port = environ.get("MASTER_PORT", "")
    listens_already = STORE_FD in environ or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if environ.get("RANK") != "0" or not port.isdigit() or environ.get("WORLD_SIZE") == "1" or listens_already:
        return None
    return port_free(environ.get("MASTER_ADDR", ""), int(port))


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs that a rank started with `environ` sees, by names that are the same in all processes."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and not _until_refused(_words(chosen)):
        return []
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is not None:
        try:
            run = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=TOOL_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return []  # the tool is installed, the driver is not
        return _choose(re.findall(r"^GPU \d+:.*\(UUID: (GPU-[^)]+)\)", run.stdout, re.MULTILINE), chosen)
    found = amd_gpus(KFD)
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):  # the second indexes what the first leaves
        found = _choose(found, environ.get(name))
    return found


def amd_gpus(nodes: Path) -> list[str]:
    """Return the kernel's numbers of AMD's GPUs (of each half of an MI250X), in the runtime's order."""
    found = []
    for node in sorted(nodes.glob("*"), key=lambda path: int(path.name) if path.name.isdigit() else -1):
        try:
            number = (node / "gpu_id").read_text().strip()
        except OSError:
            continue
        if number not in ("", "0"):  # 0: a CPU
            found.append(f"KFD-{number}")
    return found


def _choose(present: list[str], chosen: str | None) -> list[str]:
    """Return the GPUs that a *_VISIBLE_DEVICES selects, by position or by (the beginning of) their names."""
    if chosen is None:
        return present
    found = []
    for word in _until_refused(_words(chosen)):
        if word.isdigit():
            found += present[int(word) : int(word) + 1]
        else:
            found += [name for name in present if name.startswith(word)] or [word]  # a MIG part has no `GPU` line
    return found


def _until_refused(words: list[str]) -> list[str]:
    """Return the words before the first -1; CUDA ignores the rest."""
    return words[: words.index("-1")] if "-1" in words else words


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that must agree on all nodes, from their metadata."""
    found = {"python": platform.python_version()}
    for name in ("torch", "dist-gpt"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_digest(root: Path) -> str:
    """Return sha256 (16 hex digits) of names and contents of dist_gpt's and launch's source files under `root`."""
    digest = hashlib.sha256()
    for package in ("dist_gpt", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            try:
                content = path.read_bytes()
            except OSError:
                content = b"unreadable"
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def config_digest(path: Path) -> str:
    """Return sha256 (16 hex digits) of a file's content, as in CONFIG_HASH; empty if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def folder(path: Path) -> dict[str, Any]:
    """Return whether folder `path` exists and can be written, and the bytes free on its file system."""
    if not path.is_dir():
        return {"path": str(path), "visible": False, "writable": False, "free_bytes": 0}
    trial = path / f".preflight.{socket.gethostname()}.{os.getpid()}"
    try:
        trial.touch()  # checking permissions misses a file system mounted read-only on the server
        trial.unlink()
        writable = True
    except OSError:
        writable = False
    return {"path": str(path), "visible": True, "writable": writable, "free_bytes": shutil.disk_usage(path).free}
