"""The run directory: names in it that several parts read or write, and how that is done. Standard library alone.

RUN_DIR/checkpoints/step_00000010/     there only when all of it was written
RUN_DIR/resume_from                    one line: the checkpoint or run directory that this run goes on from
RUN_DIR/exit.json                      how the last attempt ended; none while ranks run
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
    """What `--resume` asks to be done to the run directory before ranks start (checkpoint.resume.resolve)."""

    goes_on: bool
    """It may be there already."""
    branch: Path | None = None
    """To be noted in resume_from."""
    newer: tuple[Path, ...] = ()
    """Its checkpoints that are not of the past of what it goes on from: to be set aside."""


def replace(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name says; -1 where it is none."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders below `folder`, the newest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) >= 0]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def later(folder: Path, step: int, own: Path) -> list[Path]:
    """Checkpoints below `folder` that are not of the past of a run that goes on from `own`, which is of `step`."""
    return [path for path in committed(folder) if step_of(path) >= step and path.resolve() != own.resolve()]


def set_aside(path: Path) -> Path:
    """Give a checkpoint folder a name that `auto` never means and that is never removed."""
    aside = path.with_name(f"aside-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def branch_of(run_dir: Path) -> Path | None:
    """What RUN_DIR/resume_from names; None where there is no such file."""
    try:
        text = (run_dir / RESUME_FROM).read_text().strip()
    except FileNotFoundError:
        return None
    return Path(text) if text else None


def ended(run_dir: Path) -> dict[str, Any]:
    """What RUN_DIR/exit.json says; empty where there is none, or none that can be read."""
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
    """Whether a step of training is written down in metrics.jsonl."""
    with suppress(OSError), open(run_dir / "metrics.jsonl", "rb") as lines:
        return any(b'"loss"' in line for line in lines)
    return False
