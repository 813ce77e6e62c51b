"""`start`: measure how long commands for a login node take from the shell, and check that they do not import torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.processes import ROOT
from benchmarks.result import Result, Row
from benchmarks.settings import Settings

NAME = "start"
TARGET_S = 0.5
RUNS = 7
COMMANDS = (("--help",), ("plan", "demo"), ("flops", "demo"))
PROBE = """
import runpy, sys
sys.argv = ["dist-gpt", *sys.argv[1:]]
try:
    runpy.run_module("dist_gpt", run_name="__main__", alter_sys=True)
except SystemExit as leaving:
    if leaving.code:
        raise
print("torch" in sys.modules, file=sys.stderr)
"""


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Run every command once to warm the file cache, then `--pairs` (default 7) times."""
    runs = settings.pairs or RUNS
    result = Result(NAME, f"wall time of a whole command, {runs} runs", settings.document())
    for command in COMMANDS:
        argv = [sys.executable, "-m", "dist_gpt", *command]
        times = [_timed(argv) for _ in range(runs + 1)][1:]
        text = f"dist-gpt {' '.join(command)}"
        say(f"{text}: {statistics.median(times):.3f} s")
        result.rows += [
            Row(f"{text}: median", statistics.median(times), "s", target=TARGET_S, at_least=False),
            Row(f"{text}: least", min(times), "s"),
            Row(f"{text}: imports torch (0 or 1)", int(imports_torch(command)), target=0, at_least=False),
        ]
        result.raw[text] = times
    return result


def _timed(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def imports_torch(command: tuple[str, ...]) -> bool:
    """Return whether torch is among the modules of the process when the command is done."""
    argv = [sys.executable, "-c", PROBE, *command]
    done = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stderr.split()[-1] == "True"
