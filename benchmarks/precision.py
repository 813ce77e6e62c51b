"""`precision`: training on the default data in bf16 and fp16 against fp32, same seed, same batches.

Three runs of the demo's model by `dist-gpt launch` on two data ranks. On a CPU without bf16 units products are made in
float32 from rounded operands and rounded (parallel/matmul.py), so that what is compared is the rounding, not the speed.
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
    """Final losses of 300 steps: validation, and the mean of the last 20 training losses."""
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
    """(final validation loss, mean of the last training losses) of one run."""
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
