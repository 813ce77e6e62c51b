"""`launcher`: measure the cost of `dist-gpt launch --via local` with 8 ranks beyond 8 processes that import torch.

Ours is the whole command: configuration, plan, data from the cache, run directory, preflight, hello and go of every
rank. Its ranks import torch and exit. The other side is 8 bare processes that import torch, started at once.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import ROOT
from benchmarks.result import Result, Row
from benchmarks.settings import Settings

NAME = "launcher"
RANKS = 8
PAIRS = 5
TARGET_S = 3.0
COMMAND = """
import sys
from dist_gpt import cli
from launch import run

argv_of = run.train_argv
run.train_argv = lambda path, *more: (*argv_of(path)[:3], sys.argv[1])
cli.main(sys.argv[2:])
"""
"""Program of the real command line, in which only the command of a rank is replaced."""


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Measure `--pairs` (default 5) alternating pairs, after one run of each side to warm the file cache."""
    pairs = settings.pairs or PAIRS
    with tempfile.TemporaryDirectory(prefix="dist-gpt-launcher-") as folder:
        program = Path(folder) / "rank.py"
        program.write_text("import torch\n")
        launched(Path(folder), program)
        bare()
        ours, plain = [], []
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 else (1, 0):
                if which:
                    ours.append(launched(Path(folder), program))
                else:
                    plain.append(bare())
            say(f"pair {pair + 1}: launch {ours[-1]:.2f} s, bare processes {plain[-1]:.2f} s")
    over = [a - b for a, b in zip(ours, plain, strict=True)]
    result = Result(NAME, f"{RANKS} ranks that import torch, {pairs} alternating pairs", settings.document())
    result.rows = [
        Row("launcher's own overhead: median", statistics.median(over), "s", target=TARGET_S, at_least=False),
        Row("launcher's own overhead: most", max(over), "s"),
        Row("dist-gpt launch: median", statistics.median(ours), "s"),
        Row(f"{RANKS} bare processes: median", statistics.median(plain), "s"),
    ]
    result.raw = {"launch_s": ours, "bare_s": plain}
    return result


def launched(folder: Path, program: Path) -> float:
    """Return the seconds of the whole command."""
    run_dir = folder / "run"
    argv = [sys.executable, "-c", COMMAND, str(program), "launch", "demo", "--set", f"run_dir={run_dir}"]
    argv += ["--set", "launch.backend=gloo"]
    started = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=_environ())
    took = time.perf_counter() - started
    shutil.rmtree(run_dir)
    return took


def bare() -> float:
    """Return the seconds until the last of RANKS processes has imported torch and exited."""
    started = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, "-c", "import torch"], cwd=ROOT, stdin=subprocess.DEVNULL, env=_environ())
        for _ in range(RANKS)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"importing torch failed, exit codes {codes}")
    return time.perf_counter() - started


def _environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
