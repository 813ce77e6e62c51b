"""Read and write files of a run directory for the launcher."""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from pathlib import Path

from dist_gpt.protocol import RUN_DIR
from dist_gpt.rundir import CHECKPOINTS, branch_of, committed, ended, note_end

TAIL_LINES = 20
ERROR_CHARACTERS = 1500
TAIL_BYTES = 64_000


def size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def tail(path: Path, start: int) -> list[str]:
    """Return the last lines of a file, at most TAIL_LINES, without its first `start` bytes."""
    with suppress(OSError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return []


def last_words(path: Path) -> str:
    """Return the error that a rank wrote to its error file (launch.spec.ERROR_FILE); empty if it wrote none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["error"])[:ERROR_CHARACTERS]
    return ""


def newest_checkpoint(run_dir: Path) -> str:
    """Return the name of the newest committed checkpoint, else what the run branches from; empty without either."""
    return next((path.name for path in committed(run_dir / CHECKPOINTS)), str(branch_of(run_dir) or ""))


def go_on(run_dir: Path, via: str) -> str:
    """Return what is saved and the command that continues from there.

    If the run would end the same way again, return instead what to change and the command to run then.
    """
    newest = newest_checkpoint(run_dir)
    launch = ["dist-gpt", "launch", str(run_dir / "config.yaml"), "--via", via]
    if change := to_change(run_dir):
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
        how, more = "continue", ["--resume", "auto"]
        if "optim." in change:  # a checkpoint continues only with the optim section that it was made with
            how, more = "start a new run", ["--set", f"run_dir={run_dir}-2"]
        again = shlex.join([*launch, *more])
        return f"{kept}; continuing unchanged would end the same way. {change}, and {how}: {again} --set KEY=VALUE"
    command = shlex.join([*launch, "--resume", "auto"])
    mine = RUN_DIR not in os.environ and "SLURM_JOB_ID" in os.environ
    script = " (or submit your own script again, if it ends in --resume auto)" if mine else ""
    saved = f"saved: {newest}; continue with" if newest else "no checkpoint yet; start again with"
    return f"{saved}: {command}{script}"


def why_left(run_dir: Path) -> str:
    """Return the reason that rank 0 wrote to exit.json; empty if it wrote none."""
    return str(ended(run_dir).get("why") or "")


def to_change(run_dir: Path) -> str:
    """Return what exit.json says must be changed before the run can get further; empty if it says nothing."""
    return str(ended(run_dir).get("change") or "")


def step_left(run_dir: Path) -> int:
    """Return the step that rank 0 wrote to exit.json; 0 if it wrote none."""
    step = ended(run_dir).get("step")
    return step if isinstance(step, int) else 0


def note_failure(run_dir: Path, code: int, why: str) -> None:
    """Write exit.json of a failed attempt, with the step and the change that rank 0 wrote there, if any.

    The launcher knows more than rank 0, which may have died before writing it (dist_gpt.train.metrics.ExitRecord).
    """
    note_end(run_dir, code, why, ended(run_dir).get("step"), ended(run_dir).get("change"))
