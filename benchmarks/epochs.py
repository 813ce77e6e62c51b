"""`epochs`: check the order of windows over two epochs of ten million windows.

Each window must be read exactly twice, with little memory and time, and in the same sequence on every layout.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.result import Result, Row
from benchmarks.settings import Settings
from dist_gpt.config.schema import Config
from dist_gpt.data.loader import Batches
from dist_gpt.data.tokens import open_prepared, prepare

NAME = "epochs"
WINDOWS, SEQ_LEN, BATCH = 10_000_000, 2, 24_000
TARGET_MB, TARGET_US = 50.0, 1.0
STEPS = -(-2 * WINDOWS // BATCH)
COMPARED = 3
"""Number of steps to compare on all layouts: at the beginning, on each side of the first epoch's end, at the end."""


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Count the windows of two epochs once: the order is arithmetic, so only the time varies."""
    what = f"two epochs over {WINDOWS:,} windows, batches of {BATCH:,}"
    result = Result(NAME, what, settings.document())
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder))
        prepared = prepare(config)
        batches = Batches(prepared, config)
        assert batches.windows == WINDOWS
        counts = np.zeros(WINDOWS, dtype=np.uint8)
        tracemalloc.start()  # it counts numpy's arrays; the process's own peak is from writing the file
        spent = _count(batches, counts)
        grown = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        wrong = int((counts != 2).sum())
        say(f"windows not seen exactly twice: {wrong}; {spent / (2 * WINDOWS) * 1e6:.3f} us of CPU time a window")
        result.rows += [
            Row("windows not seen exactly twice", wrong, target=0, at_least=False),
            Row("growth of peak memory (tracemalloc)", grown, "MB", target=TARGET_MB, at_least=False),
            Row("CPU time of a window's place", spent / (2 * WINDOWS) * 1e6, "us", target=TARGET_US, at_least=False),
        ]
        for name, differ in _compare(batches, prepared.path, config).items():
            say(f"{name}: {differ} windows differ from one rank's")
            result.rows.append(Row(f"{name}: windows that differ from one rank's", differ, target=0, at_least=False))
    return result


def _config(folder: Path) -> Config:
    """Return the configuration of a new file with tokens for exactly WINDOWS windows and a validation part."""
    count = WINDOWS * SEQ_LEN + 1
    held = 1_000
    ids = np.arange(count + held, dtype=np.uint32) % 50_000
    ids.astype("<u2").tofile(folder / "ids.bin")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "seq_len": SEQ_LEN, "vocab_size": 50_000}
    data = {
        "source": str(folder / "ids.bin"), "cache": str(folder / "cache"), "val_fraction": (held + 0.5) / len(ids),
        "dtype": "uint16",
    }  # fmt: skip
    return Config.model_validate({"model": sizes, "train": {"steps": STEPS, "global_batch": BATCH}, "data": data})


def _count(batches: Batches, counts: NDArray[np.uint8]) -> float:
    """Count every window of the two epochs; return the CPU seconds that the order took."""
    left, spent = 2 * WINDOWS, 0.0
    for step in range(STEPS):
        started = time.process_time()  # other processes may share the cores
        starts = batches.offsets(step, 0, BATCH)
        spent += time.process_time() - started
        starts = starts[: min(left, BATCH)]
        left -= len(starts)
        np.add.at(counts, starts // SEQ_LEN, np.uint8(1))
    return spent


def _compare(batches: Batches, path: Path, config: Config) -> dict[str, int]:
    """Return how many windows other readers read differently: more ranks, and a process that resumes half way."""
    steps = [*range(COMPARED), *range(STEPS // 2 - COMPARED, STEPS // 2 + COMPARED), *range(STEPS - COMPARED, STEPS)]
    found = {}
    for dp in (1, 3, 8):
        ranks = [Batches(open_prepared(path), config) for _ in range(dp)]
        found[f"dp {dp}"] = sum(_differ(batches, ranks, step) for step in steps)
    resumed = Batches(open_prepared(path), config)
    later = [step for step in steps if step >= STEPS // 2]
    found["resumed half way"] = sum(_differ(batches, [resumed], step) for step in later)
    return found


def _differ(batches: Batches, ranks: list[Batches], step: int) -> int:
    share = BATCH // len(ranks)
    read = np.concatenate([rank.sample(step, number * share, share) for number, rank in enumerate(ranks)])
    return int((read != batches.sample(step, 0, BATCH)).any(axis=1).sum())
