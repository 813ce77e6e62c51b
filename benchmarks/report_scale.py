"""`report-scale`: measure the time and memory of `dist-gpt report` on a synthetic run.

The run has 1,024 ranks and 20 steps with 100 rows each. The tests' generator writes it from real step lists, so it has
as many channels, waits and messages as a run of that layout. The report runs in a separate process, whose peak counts.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, WorkerError
from benchmarks.result import Result, Row
from benchmarks.settings import Settings
from dist_gpt.report.analysis.analyze import analyze, profile
from dist_gpt.report.read.load import load
from dist_gpt.report.write import write_files

NAME = "report-scale"
STEPS = 20
TARGET_S, TARGET_BYTES, TARGET_HTML_BYTES = 45.0, 2e9, 6e6
LAYOUT = ("parallel.dp=16", "parallel.tp=8", "parallel.pp=8")
MODEL = ("model.num_layers=14", "model.num_heads=8", "train.global_batch=80", "optim.bucket_mb=25")


def work(folder: Path) -> dict[str, float]:
    """Do the report's work and return the seconds of every stage, and counts. New stages of the report belong here."""
    stages: dict[str, float] = {}
    started = time.perf_counter()

    def done(stage: str) -> None:
        stages[stage] = time.perf_counter() - started - sum(stages.values())

    run = load(folder)
    done("load")
    found = profile(run)
    done("align, match, budget")
    document = analyze(run, found)
    done("analyze")
    write_files(run, found, document)
    done("write")
    if run.problems or not found.meetings.complete.all():
        raise WorkerError(f"the run was not read completely: {run.problems}")
    rows = sum(len(log.calls) + len(log.spans) for log in run.ranks.values())
    html = (folder / "report.html").stat().st_size
    return {**stages, "rows": rows, "calls": len(found.calls), "meetings": len(found.meetings), "html_bytes": html}


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Write the run once and report on it `--pairs` (default 1) times."""
    what = f"the report's work on 1,024 ranks x {STEPS} steps, the slowest of {settings.pairs or 1}"
    result = Result(NAME, what, settings.document())
    with tempfile.TemporaryDirectory(prefix="report_scale_") as name:
        folder = Path(name)
        started = time.perf_counter()
        size = _write(folder)
        say(f"wrote {size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")
        found = [_measured(folder) for _ in range(settings.pairs or 1)]
    for one in found:
        say(", ".join(f"{key} {value:,.4g}" for key, value in one.items()))
    worst = max(found, key=lambda one: one["seconds"])
    result.rows = [
        Row("rows", worst["rows"]),
        Row("bytes of event files", size, "B"),
        *(
            Row(f"seconds: {stage}", worst[stage], "s")
            for stage in ("load", "align, match, budget", "analyze", "write")
        ),
        Row("seconds, with imports", worst["seconds"], "s", target=TARGET_S, at_least=False),
        Row("report.html", worst["html_bytes"], "B", target=TARGET_HTML_BYTES, at_least=False),
        Row("peak resident size", max(one["peak_bytes"] for one in found), "B", target=TARGET_BYTES, at_least=False),
    ]
    result.raw["measured"] = found
    return result


def _write(folder: Path) -> int:
    """Write the run directory and return its size in bytes."""
    from tests.unit.synthetic import Clock, small, write

    config = small(*LAYOUT, *MODEL, f"train.steps={STEPS}", window=(1, STEPS))
    clocks = {rank: Clock(rank * 1_000_000, rank % 7 - 3.0) for rank in range(1, config.world_size)}
    write(folder, config, clocks=clocks, keep=False)
    return sum(path.stat().st_size for path in folder.iterdir())


def _measured(folder: Path) -> dict[str, Any]:
    argv = [sys.executable, "-m", "benchmarks.report_scale", str(folder)]
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False)
    if done.returncode:
        raise WorkerError(f"the child ended with code {done.returncode}; its own message is above")
    return {**json.loads(done.stdout), "seconds": time.perf_counter() - started}


def main(folder: str) -> None:
    """Run `work` in the child process and print its result and the peak resident size."""
    found = work(Path(folder))
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kB on Linux
    print(json.dumps({**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}))


if __name__ == "__main__":
    main(sys.argv[1])
