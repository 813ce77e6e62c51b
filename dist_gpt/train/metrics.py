"""Write the metrics of a run to metrics.jsonl, the console and Weights & Biases. Torch-free.

    tracker = Tracker(config, run_dir, rank)
    tracker.validation(0, 5.55)
    tracker.step({"step": 1, "loss": 5.5, "grad_norm": 2.0, "lr": 3e-5, "tokens_per_s": 9000.0, "step_s": 0.2})
    tracker.close()

Only rank 0 writes metrics and progress; `message` prints on every rank (each has its own log).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.protocol import TERMINAL
from dist_gpt.rundir import EXIT, note_end, replace

if TYPE_CHECKING:
    from rich.progress import Progress

    from dist_gpt.config.schema import Config

SMOOTH = 0.9  # weight of past steps in the average step time behind the ETA


class ExitRecord:
    """Writer of RUN_DIR/exit.json, the record of how this attempt ended (rundir.note_end).

    Only rank 0 writes it. The file does not exist while ranks run.
    """

    def __init__(self, run_dir: str | Path, rank: int) -> None:
        self._run_dir = Path(run_dir) if rank == 0 else None
        if self._run_dir is not None:
            (self._run_dir / EXIT).unlink(missing_ok=True)  # an earlier attempt's

    def write(self, code: int, why: str | None, step: int, change: str | None = None) -> None:
        """Note that the process will exit with `code` after `step` steps.

        `change` says what to change if the run would end the same way again. Errors in writing are ignored.
        """
        if self._run_dir is not None:
            note_end(self._run_dir, code, why, step, change)


def require_wandb(mode: str) -> None:
    """Raise ConfigError if `mode` needs the package wandb and it is not installed."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError([
            f"log.wandb.mode: got {mode}, which needs the package wandb, and it is not installed; "
            "pip install 'dist-gpt[wandb]', or set log.wandb.mode=disabled"
        ])  # fmt: skip


def step_line(record: dict[str, Any], steps: int, eta_s: float | None) -> str:
    """Return a line like `step  12/200  loss 3.1234  norm 1.23  lr 3.0e-04  12345 tokens/s  epoch 0.36  eta 0:35`.

    Missing values are left out.
    """
    width = len(str(steps))
    parts = [f"step {record['step']:>{width}}/{steps}"]
    formats = {
        "loss": "loss {:.4f}", "grad_norm": "norm {:.2f}", "lr": "lr {:.1e}", "tokens_per_s": "{:.0f} tokens/s",
        "epoch": "epoch {:.2f}",
    }  # fmt: skip
    parts += [text.format(record[key]) for key, text in formats.items() if record.get(key) is not None]
    if record.get("skipped"):
        scale = f", loss scale now {record['loss_scale']:g}" if record.get("loss_scale") is not None else ""
        parts.append(f"skipped{scale}")
    if eta_s is not None:
        parts.append(f"eta {clock(eta_s)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Return a duration in the form 0:35, 12:05 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def cut_metrics(path: Path, step: int) -> None:
    """Cut the file atomically after the lines of steps up to `step`, from which a run continues."""
    if not path.is_file():
        return
    kept = [line for line in path.read_bytes().split(b"\n")[:-1] if _step_of(line) <= step]
    replace(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinite if it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Metrics:
    """Writer of metrics.jsonl: one line per step, unbuffered, in order. Non-finite numbers are written as null.

    `after`: the run continues after that step; lines of later steps, left by an earlier attempt, are cut off.
    """

    def __init__(self, path: Path, after: int | None = None) -> None:
        if after is not None:
            cut_metrics(path, after)
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 (held until close)
        self._file.close()
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 ("a" cannot rewrite the last line)
        self._start = self._file.seek(0, os.SEEK_END)
        self._last: dict[str, Any] = {}

    def add(self, step: int, fields: dict[str, Any]) -> None:
        """Append the line of a step. A second call in a row for the same step adds its fields to that line."""
        if self._last.get("step") != step:
            self._start = self._file.seek(0, os.SEEK_END)
            self._last = {"step": step}
        self._last.update({key: _finite(value) for key, value in fields.items()})
        self._file.seek(self._start)
        self._file.write(json.dumps(self._last, allow_nan=False).encode() + b"\n")
        self._file.truncate()

    def sync(self) -> None:
        """Flush the file to the disk, so that no checkpoint is ahead of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Progress on standard output: plain lines, and on a terminal a bar below them."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps = steps
        self.every = every
        self._step_s: float | None = None
        self._before = time.monotonic()
        self._bar: Progress | None = None
        columns = os.environ.get(TERMINAL)  # width of the terminal behind a launcher's pipe; empty: no terminal
        if columns or (columns is None and sys.stdout.isatty()):
            self._bar = _bar(steps, int(columns) if columns else None)

    def step(self, record: dict[str, Any]) -> None:
        """Update the bar, and print the line of every `every`-th step, the first and the last."""
        now = time.monotonic()
        took = record.get("step_s") or now - self._before
        self._before = now
        self._step_s = took if self._step_s is None else SMOOTH * self._step_s + (1 - SMOOTH) * took
        step = record["step"]
        eta = max(0, self.steps - step) * self._step_s
        if step % self.every == 0 or step in (1, self.steps):
            self.line(step_line(record, self.steps, eta))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, eta=clock(eta))

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(steps: int, columns: int | None) -> Progress:
    from rich import console, progress

    terminal = console.Console(file=sys.stdout, force_terminal=True, width=columns)
    bar = progress.Progress(
        progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("eta {task.fields[eta]}"),
        console=terminal, transient=True, redirect_stderr=False, refresh_per_second=4,
    )  # fmt: skip
    bar.add_task("steps", total=steps, eta="-")
    bar.start()
    return bar


class Tracker:
    """Progress reports of a run to metrics.jsonl, the console and wandb. As a context manager it closes itself.

    `after` is the step after which a resumed run continues (-1: from the start, dropping existing lines). wandb, if
    log.wandb.mode asks for it, writes into the run directory; ConfigError is raised if it is not installed.
    """

    def __init__(self, config: Config, run_dir: str | Path, rank: int = 0, after: int | None = None) -> None:
        self._metrics: Metrics | None = None
        self._console: Console | None = None
        self._wandb: Any = None
        if rank != 0:
            return
        self._wandb = _start_wandb(config, Path(run_dir))
        self._metrics = Metrics(Path(run_dir) / "metrics.jsonl", after)
        self._console = Console(config.train.steps, config.log.every)

    def step(self, record: dict[str, Any]) -> None:
        """Report one optimizer step.

        `record` holds step (counted from 1) and any of loss, grad_norm, lr, tokens_per_s, step_s (seconds), val_loss
        and others, as plain numbers.
        """
        if self._metrics is None or self._console is None:
            return
        self._metrics.add(record["step"], {key: value for key, value in record.items() if key != "step"})
        self._console.step(record)
        if record.get("val_loss") is not None:
            self._console.line(f"step {record['step']}  validation loss {record['val_loss']:.4f}")
        self._to_wandb(record)

    def validation(self, step: int, val_loss: float) -> None:
        """Report the validation loss after `step` steps (0: before the first), on that step's line in metrics.jsonl."""
        if self._metrics is None or self._console is None:
            return
        self._metrics.add(step, {"val_loss": val_loss})
        self._console.line(f"step {step}  validation loss {val_loss:.4f}")
        self._to_wandb({"step": step, "val_loss": val_loss})

    def sync(self) -> None:
        """Flush the metrics to the disk."""
        if self._metrics is not None:
            self._metrics.sync()

    def message(self, text: str) -> None:
        """Print a line for users on this rank's own output."""
        if self._console is not None:
            self._console.line(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        console, metrics, wandb = self._console, self._metrics, self._wandb
        self._console = self._metrics = self._wandb = None
        if console is not None:
            console.close()
        if metrics is not None:
            metrics.close()
        if wandb is not None:
            wandb.finish()

    def _to_wandb(self, record: dict[str, Any]) -> None:
        """Log to wandb, which rejects steps below the last one and merges calls for the same step."""
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start_wandb(config: Config, run_dir: Path) -> Any:
    """Return a new wandb run, or None if log.wandb.mode is disabled."""
    settings = config.log.wandb
    require_wandb(settings.mode)
    if settings.mode == "disabled":
        return None
    import wandb

    return wandb.init(
        project=settings.project, name=config.name, dir=str(run_dir), mode=settings.mode,
        config=config.model_dump(mode="json"), settings=wandb.Settings(silent=True),
    )  # fmt: skip
