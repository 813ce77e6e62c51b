"""`precision`: compare training on the default data in bf16 and fp16 with fp32, with the same seed and batches.

The demo's model is trained three times by `dist-gpt launch` on two data ranks. A CPU without bf16 units computes
matmuls in float32 from rounded operands and rounds the result (parallel/matmul.py): this compares rounding, not speed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import ROOT, WorkerError
from benchmarks.result import Result, Row
from benchmarks.settings import Settings

NAME = "precision"
STEPS = 300
LAST = 20
TARGET = 0.01
DTYPES = ("fp32", "bf16", "fp16")


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Compare final losses of 300 steps: the validation loss, and the mean of the last 20 training losses."""
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="dist-gpt-precision-") as folder:
        for dtype in DTYPES:
            found[dtype] = trained(Path(folder) / dtype, dtype, settings)
            say(f"{dtype}: validation loss {found[dtype][0]:.4f}, training loss {found[dtype][1]:.4f}")
    result = Result(NAME, f"the demo's model and data, {STEPS} steps, two data ranks, zero1", settings.document())
    for dtype in DTYPES[1:]:
        for what, place in (("validation loss", 0), (f"training loss, mean of the last {LAST}", 1)):
            off = abs(found[dtype][place] / found["fp32"][place] - 1)
            result.rows.append(Row(f"{dtype} against fp32: {what}", off, "share", target=TARGET, at_least=False))
    result.rows += [Row(f"{dtype}: validation loss", found[dtype][0], "nats") for dtype in DTYPES]
    return result


def trained(run_dir: Path, dtype: str, settings: Settings) -> tuple[float, float]:
    """Train in `dtype` and return the final validation loss and the mean of the last training losses."""
    sets = {
        "parallel.dp": 2, "parallel.tp": 1, "parallel.pp": 1, "train.dtype": dtype, "train.steps": STEPS,
        "train.eval_every": STEPS, "run_dir": run_dir,
    }  # fmt: skip
    argv = [sys.executable, "-m", "dist_gpt", "launch", "demo"]
    for text in [*(f"{key}={value}" for key, value in sets.items()), *settings.overrides]:
        argv += ["--set", text]
    ran = subprocess.run(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                         check=False)  # fmt: skip
    if ran.returncode:
        raise WorkerError(f"training in {dtype} failed:\n{ran.stderr[-2000:]}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    validation = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    return validation[-1], statistics.fmean(losses[-LAST:])
