"""Run directories with planted truths, as a run of the real program would leave them.

    truth = write(folder, small("parallel.tp=2"), late=[Late(rank=3, ns=4_000_000)], clocks={3: Clock(3 * SECOND)})

Steps are simulated (`simulated`), so who waits for whom follows from what is planted; `config.yaml`, `plan.json` and
the step lists are the program's own. Everything is determined by the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_gpt.config.load import dump, load
from dist_gpt.config.schema import Config, ProfileConfig
from dist_gpt.events import CALL, SCHEMA, SPAN
from dist_gpt.layout import BASE_AXES
from dist_gpt.plan.api import plan_document
from tests.unit.simulated import Late, Ranks, Simulation, Times

MS, SECOND = 1_000_000, 1_000_000_000
BASE_NS = 5_000 * SECOND
"""Rank 0's raw clock when its header was written."""
BEFORE_NS, BETWEEN_NS = 2 * SECOND, 100_000
"""From the header to the first step, and from a step to the next."""
SMALL = ("model.num_layers=4", "model.hidden_size=16", "model.num_heads=4", "model.seq_len=8", "model.vocab_size=64",
         "parallel.dp=1", "parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false", "train.steps=6",
         "train.global_batch=8", "train.micro_batch=1", "train.eval_every=0", "train.eval_batches=0",
         "optim.bucket_mb=0.005", "optim.warmup=2")  # fmt: skip


@dataclass(frozen=True)
class Clock:
    """How a rank's clock differs from rank 0's, and what its two readings say: `wrong_ns` too much, +- `error_ns`."""

    ns: int = 0
    drift_ppm: float = 0.0
    error_ns: int = 20_000
    wrong_ns: tuple[int, int] = (0, 0)
    readings: int = 2

    def raw(self, true: Any) -> Any:
        """What it shows at `true` ns (int64) of rank 0's raw clock."""
        return true + self.ns + np.rint((true - BASE_NS) * (self.drift_ppm * 1e-6)).astype(np.int64)


@dataclass
class Truth:
    """Per rank the rows of its file with columns issue and start in true time: ns of rank 0's raw clock."""

    config: Config
    calls: dict[int, np.ndarray] = field(default_factory=dict)
    spans: dict[int, np.ndarray] = field(default_factory=dict)
    clocks: dict[int, Clock] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    """Step -> when it begins, on all ranks."""


def small(*sets: str, window: tuple[int, int] | None = (2, 4)) -> Config:
    """A configuration of a few layers, profiled from step 2 to step 4 of 6."""
    config = load("demo", [*SMALL, *sets])
    return config.model_copy(update={"profile": ProfileConfig(steps=None if window is None else list(window))})


# --- the files ------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    config: Config,
    times: Times | None = None,
    late: Sequence[Late] = (),
    clocks: Mapping[int, Clock] | None = None,
    ranks_per_host: int = 8,
    seed: int = 0,
    keep: bool = True,
) -> Truth:
    """Write a run directory of `config`, resolved. With `keep`, the truth holds all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = Ranks(config, times or Times())
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps(plan_document(config, 0)), encoding="utf-8")
    truth = Truth(config, clocks={rank: (clocks or {}).get(rank, Clock()) for rank in range(ranks.world)})
    scenarios: dict[Any, Simulation] = {}
    steps: dict[int, Simulation] = {}
    at = BASE_NS + BEFORE_NS
    for step in range(1, config.train.steps + 1):
        active = tuple(one for one in late if one.steps is None or step in one.steps)
        key = (active, step) if ranks.times.jitter else active
        if key not in scenarios:
            scenarios[key] = Simulation(ranks, active, seed + step)
        steps[step], truth.starts[step] = scenarios[key], at
        at += max(scenarios[key].ends) + BETWEEN_NS
    for rank in range(ranks.world):
        _write_rank(folder, ranks, truth, rank, steps, f"n{rank // ranks_per_host}", keep)
    _write_metrics(folder, config, steps)
    return truth


def _write_rank(
    folder: Path, ranks: Ranks, truth: Truth, rank: int, steps: dict[int, Simulation], host: str, keep: bool
) -> None:
    clock, first = truth.clocks[rank], truth.starts[1]
    base = int(clock.raw(np.int64(BASE_NS)))
    last = max(truth.starts.values()) + SECOND
    readings = [_reading(clock, base, true, i) for i, true in enumerate((first - SECOND, last))][: clock.readings]
    lines = [json.dumps(_header(ranks, rank, base, host), separators=(",", ":")), *readings[:1]]
    window = ranks.config.profile.steps or [0, -1]
    kept: dict[int, list[np.ndarray]] = {CALL: [], SPAN: []}
    for step, simulation in steps.items():
        calls, spans = simulation.rows(rank)
        if window[0] <= step <= window[1]:
            for kind, rows, column in ((CALL, calls, 5), (SPAN, spans, 2)):
                rows = np.insert(rows, 0, step, axis=1)
                rows[:, column] += truth.starts[step]
                kept[kind].append(rows)
                lines += _text(kind, _local(kind, rows, column, clock, base))
        lines.append(_step(ranks, rank, step, simulation, int(clock.raw(np.int64(truth.starts[step]))) - base))
    lines += [*_closing(ranks, rank, len(steps)), *readings[1:], _end(simulation, rank)]
    (folder / f"events.rank{rank}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if keep and kept[CALL]:
        truth.calls[rank], truth.spans[rank] = (np.concatenate(kept[kind]) for kind in (CALL, SPAN))


def _local(kind: int, rows: np.ndarray, column: int, clock: Clock, base: int) -> np.ndarray:
    """Rows as the rank's own clock sees them."""
    rows = rows.copy()
    true = rows[:, column].copy()
    rows[:, column] = clock.raw(true) - base
    for after in range(column + 1, column + 5 if kind == CALL else column + 2):
        moved = clock.raw(true + rows[:, after]) - base - rows[:, column]
        rows[:, after] = np.where(rows[:, after] >= 0, moved, -1)
    return rows


def _text(kind: int, rows: np.ndarray) -> list[str]:
    """One string of many lines: quick for millions."""
    if not len(rows):
        return []
    return [json.dumps(np.insert(rows, 0, kind, axis=1).tolist(), separators=(",", ":"))[1:-1].replace("],[", "]\n[")]


def _header(ranks: Ranks, rank: int, base: int, host: str) -> dict[str, Any]:
    at = ranks.layout.coords(rank)
    return {
        "schema": SCHEMA, "rank": rank, "coords": {axis: getattr(at, axis) for axis in BASE_AXES}, "attempt": 0,
        "world": ranks.world, "host": host, "pid": 1000 + rank, "start_s": 4.2, "cores": 2, "threads": 1,
        "device": "cpu", "backend": "gloo", "base_ns": base, "unix_s": 1764000000.1,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "dist_gpt": "0.1"},
        "environment": {"OMP_NUM_THREADS": "1"}, "window": ranks.config.profile.steps,
        "channels": ranks.channels(rank),
    }  # fmt: skip


def _reading(clock: Clock, base: int, true: int, which: int) -> str:
    own = int(clock.raw(np.int64(true)))
    fact = {"at_ns": own - base, "offset_ns": true - own + clock.wrong_ns[which], "error_ns": clock.error_ns}
    return json.dumps({"clock": fact})


def _step(ranks: Ranks, rank: int, step: int, simulation: Simulation, start: int) -> str:
    calls, spans = simulation.rows(rank)
    blocked: dict[str, int] = {}
    axes = [channel["axis"] for channel in ranks.channels(rank)]
    for channel, ns in zip(calls[:, 1], calls[:, 5] + calls[:, 8] - calls[:, 7], strict=True):
        blocked[axes[channel]] = blocked.get(axes[channel], 0) + int(ns)
    seconds = json.dumps({axis: ns / SECOND for axis, ns in blocked.items()})
    data = int(spans[spans[:, 0] < 0, 2].sum()) / SECOND
    return (
        f'{{"step":{step},"phase":"train","step_s":{simulation.ends[rank] / SECOND},"start_ns":{start},'
        f'"comm":{ranks.facts(rank)[0]},"blocked_s":{seconds},"data_s":{data},"between_cpu_s":1.0}}'
    )


def _closing(ranks: Ranks, rank: int, step: int) -> list[str]:
    """Memory, a kernel and a ceiling."""
    parts = ranks.facts(rank)[1]
    peak = parts["peak"]
    memory = {"step": step, "parts": parts, "peak_bytes": peak, "source": "mallinfo2", "rss_bytes": 2 * peak}
    m, k = ranks.plan(rank).tokens, ranks.config.model.hidden_size
    kernel = {"name": "mlp.up", "shape": [m, k, 4 * k], "batch": 1, "flops": 8 * m * k * k, "bytes": 20 * m * k}
    kernel["seconds"] = 8 * m * k * k / 2e10
    ceiling = {"flops_per_s": 5e10, "bytes_per_s": 1e10, "dtype": ranks.config.train.dtype}
    return [json.dumps({kind: value}) for kind, value in (("memory", memory), ("kernel", kernel), ("ceiling", ceiling))]


def _end(simulation: Simulation, rank: int) -> str:
    records = len(simulation.rows(rank)[0])
    end = {"differences": [], "dropped": 0, "record_ns": 2100.0, "records_per_step": float(records), "wall_s": 20.0}
    return json.dumps({"end": end})


def _write_metrics(folder: Path, config: Config, steps: dict[int, Simulation]) -> None:
    tokens = config.train.global_batch * config.model.seq_len
    lines = []
    for step, simulation in steps.items():
        seconds = simulation.ends[0] / SECOND
        row = {"step": step, "loss": 5.5 - step / 100, "grad_norm": 1.0, "lr": 3e-4, "tokens_per_s": tokens / seconds,
               "step_s": seconds}  # fmt: skip
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- damage ---------------------------------------------------------------------------------------------------------


def edit(folder: Path, rank: int, change: Callable[[list[str]], list[str]]) -> None:
    """Rewrite the lines of a rank's event file."""
    path = folder / f"events.rank{rank}.jsonl"
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").split("\n"))), encoding="utf-8")


def places(lines: Sequence[str], kind: int, step: int) -> list[int]:
    """Where the rows of `kind` of a step stand."""
    return [i for i, line in enumerate(lines) if line.startswith(f"[{kind},{step},")]
