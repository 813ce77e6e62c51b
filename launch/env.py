"""Find the GPUs of this machine without torch, and decide whether a job can use them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from dist_gpt.config.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """Device on which ranks compute, and the sentence that says so."""

    kind: str
    """cuda or cpu."""
    sentence: str


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs a rank started with `environ` would see; 0 if the installed torch is a CPU build."""
    if torch_is_cpu_build():
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else _chosen(visible)
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return chosen or 0
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0  # the tool is installed, the driver is not
    present = sum(line.startswith("GPU ") for line in listing.splitlines())
    return present if chosen is None else min(present, chosen)


def _chosen(visible: str) -> int:
    """Return the number of entries of CUDA_VISIBLE_DEVICES; CUDA ignores everything from the first -1 on."""
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    return entries.index("-1") if "-1" in entries else len(entries)


def torch_is_cpu_build() -> bool:
    """Return whether the installed torch's version ends with `+cpu` (read from the package's metadata)."""
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def choose_device(ranks_per_node: int, gpus: int, backend: str = "auto") -> Device:
    """Return GPUs if every rank can have its own, else the CPU. `backend` nccl requires GPUs, gloo the CPU.

    Raise ConfigError if nccl is asked for and GPUs are missing.
    """
    if backend == "gloo":
        return Device("cpu", "gloo on CPU (launch.backend: gloo)")
    if backend == "nccl" and gpus < ranks_per_node:
        raise ConfigError([
            f"launch.backend: nccl needs a GPU for every rank, {ranks_per_node} per node, but this machine has {gpus}; "
            "start it on a machine with enough GPUs, or try it here with --set launch.backend=gloo"
        ])  # fmt: skip
    if gpus == 0:
        return Device("cpu", "no GPU found: gloo on CPU")
    found = f"{gpus} GPU{'s' if gpus > 1 else ''} found"
    if gpus >= ranks_per_node:
        return Device("cuda", f"{found}, {ranks_per_node} used, one per process: NCCL")
    return Device(
        "cpu",
        f"{found}, but {ranks_per_node} ranks need one each: gloo on CPU. To use the GPUs, start fewer ranks, for "
        f"example --set parallel.dp=auto --set parallel.tp=1 --set parallel.pp=1",
    )
