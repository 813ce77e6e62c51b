"""Describe the machine: versions, GPUs and missing packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu_check.packages import missing
from benchmarks.gpu_check.section import Context

QUERY = "name,driver_version,memory.total,mig.mode.current,clocks.max.sm,power.limit"


def run(context: Context) -> None:
    """Report versions, device and missing packages."""
    context.put("python", platform.python_version())
    context.put("torch", torch.__version__)
    context.put("cuda", torch.version.cuda)
    context.put("cudnn", torch.backends.cudnn.version())
    context.put("nccl", nccl_version())
    context.put("cpus", len(os.sched_getaffinity(0)))
    context.put("device", context.device.facts())
    context.put("nvidia_smi", nvidia_smi())
    context.put("missing_packages", [package.name for package in missing()])


def nccl_version() -> str | None:
    """Return NCCL's version; None if torch has no NCCL."""
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except (AttributeError, RuntimeError, ImportError):
        return None


def nvidia_smi(program: str = "nvidia-smi") -> dict[str, Any] | None:
    """Return nvidia-smi's lines on GPUs (`query`) and on devices with MIG slices (`devices`); None if not found."""
    path = shutil.which(program)
    if path is None:
        return None
    found: dict[str, Any] = {}
    calls = {"query": [f"--query-gpu={QUERY}", "--format=csv,noheader"], "devices": ["-L"]}
    for name, arguments in calls.items():
        try:
            done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
            found[name] = (done.stdout or done.stderr).strip().splitlines()[:16]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[name] = [str(error)]
    return found
