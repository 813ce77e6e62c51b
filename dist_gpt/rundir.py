"""Read and write the files of a run directory that several modules share. Standard library only.

RUN_DIR/checkpoints/step_00000010/     exists only once it is complete
RUN_DIR/resume_from                    one line: the checkpoint or run directory from which this run continues
RUN_DIR/exit.json                      how the last attempt ended; absent while ranks run
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
EXIT = "exit.json"
RESUME_FROM = "resume_from"
_STEP = re.compile(r"step_(\d{8,12})")


@dataclass(frozen=True)
class Resume:
    """Changes to the run directory that `--resume` asks for before ranks start (see checkpoint.resume.resolve)."""

    goes_on: bool
    """True if the run directory may exist already."""
    branch: Path | None = None
    """Path to write to resume_from."""
    newer: tuple[Path, ...] = ()
    """Checkpoints of the run directory to set aside: those outside the history of the one from which it continues."""


def replace(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: a reader sees the old or the new content."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name; -1 if it is not a checkpoint's name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def committed(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, the newest first; none if `folder` does not exist."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) >= 0]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def later(folder: Path, step: int, own: Path) -> list[Path]:
    """Return the checkpoints in `folder` of `step` or later except `own`, the one of `step` that a run continues."""
    return [path for path in committed(folder) if step_of(path) >= step and path.resolve() != own.resolve()]


def set_aside(path: Path) -> Path:
    """Rename a checkpoint folder so that `--resume auto` ignores it and it is never removed. Return the new path."""
    aside = path.with_name(f"aside-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def branch_of(run_dir: Path) -> Path | None:
    """Return the path in RUN_DIR/resume_from; None if the file is missing or empty."""
    try:
        text = (run_dir / RESUME_FROM).read_text().strip()
    except FileNotFoundError:
        return None
    return Path(text) if text else None


def ended(run_dir: Path) -> dict[str, Any]:
    """Return the content of RUN_DIR/exit.json; empty if it is missing or unreadable."""
    path = run_dir / EXIT
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    return {}


def note_end(run_dir: Path, code: int, why: str | None, step: int | None, change: str | None = None) -> None:
    """Write RUN_DIR/exit.json, {code, why, step, time, change, job}.

    `why` is null if all steps were done, `time` is in seconds since 1970, `change` (what to change) is there only if
    the run would end the same way again, and `job` only under Slurm. Do nothing if the run directory cannot be written:
    that must not hide how the run ended.
    """
    end: dict[str, Any] = {"code": code, "why": why, "step": step, "time": time.time()}
    if change is not None:
        end["change"] = change
    if "SLURM_JOB_ID" in os.environ:
        end["job"] = os.environ["SLURM_JOB_ID"]
    with suppress(OSError):
        replace(run_dir / EXIT, json.dumps(end) + "\n")


def has_trained(run_dir: Path) -> bool:
    """Return whether metrics.jsonl of the run holds a training step."""
    with suppress(OSError), open(run_dir / "metrics.jsonl", "rb") as lines:
        return any(b'"loss"' in line for line in lines)
    return False
