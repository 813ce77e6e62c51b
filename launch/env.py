"""What this machine offers, found without torch: GPUs, and whether a job can use them."""

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
    """Where ranks compute, and the sentence that says so."""

    kind: str
    """cuda or cpu."""
    sentence: str


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that a rank started with `environ` would see; 0 where the installed torch is a CPU build."""
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
        return 0  # the tool is there, the driver is not
    present = sum(line.startswith("GPU ") for line in listing.splitlines())
    return present if chosen is None else min(present, chosen)


def _chosen(visible: str) -> int:
    """Entries of CUDA_VISIBLE_DEVICES; CUDA ignores everything from the first -1 on."""
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    return entries.index("-1") if "-1" in entries else len(entries)


def torch_is_cpu_build() -> bool:
    """Whether the installed torch's version says `+cpu` (read from the package's metadata)."""
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def choose_device(ranks_per_node: int, gpus: int, backend: str = "auto") -> Device:
    """GPUs when every rank can have its own, else the CPU. `backend` nccl insists on GPUs, gloo on the CPU.

    Raises ConfigError where nccl is asked for and GPUs are missing.
    """
    if backend == "gloo":
        return Device("cpu", "gloo on CPU, as launch.backend says")
    if backend == "nccl" and gpus < ranks_per_node:
        raise ConfigError([
            f"launch.backend: nccl needs a GPU for each of the {ranks_per_node} ranks of a node, and this machine has "
            f"{gpus}; start it where there are enough, or try it here with --set launch.backend=gloo"
        ])  # fmt: skip
    if gpus == 0:
        return Device("cpu", "no GPU found: gloo on CPU")
    found = f"{gpus} GPU{'s' if gpus > 1 else ''} found"
    if gpus >= ranks_per_node:
        return Device("cuda", f"{found}, {ranks_per_node} used, one per process: NCCL")
    return Device(
        "cpu",
        f"{found}, but {ranks_per_node} ranks need one each: gloo on CPU. To use the GPUs start fewer ranks, for "
        f"example --set parallel.dp=auto --set parallel.tp=1 --set parallel.pp=1",
    )
