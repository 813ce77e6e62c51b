"""Records of what was communicated, and how they are counted. Torch-free: the report reads them too.

Payload is the full tensor (all-gather and reduce-scatter: the unsharded one; all-reduce once; a send its own, a
receive 0). Wire bytes are what one rank puts on the wire in the ring algorithm: floor(factor x payload) per call,
with the factors of nccl-tests (doc/PERFORMANCE.md).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
TRAIN, EVAL, SAVE, CONTROL = "train", "eval", "save", "control"


def wire_bytes(op: str, payload: int, size: int) -> int:
    """Bytes one rank of a group of `size` sends for one call of `op` on `payload` bytes."""
    if op == "all_reduce":
        return 2 * (size - 1) * payload // size
    if op in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        return (size - 1) * payload // size
    if op == "send":
        return payload
    if op in ("recv", "barrier"):
        return 0
    raise ValueError(f"unknown collective {op!r}")


@dataclass(slots=True)
class Tally:
    """Calls and bytes of one (axis, op)."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0

    def add(self, calls: int, payload: int, wire: int) -> None:
        self.calls += calls
        self.payload_bytes += payload
        self.wire_bytes += wire

    def as_dict(self) -> dict[str, int]:
        return {"calls": self.calls, "payload_bytes": self.payload_bytes, "wire_bytes": self.wire_bytes}


class Counts:
    """Tallies by (axis, op); the common form of plan, ledger and dry run."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)

    def add(self, axis: str, op: str, calls: int, payload_each: int, size: int) -> None:
        """Count `calls` collectives of `payload_each` bytes in a group of `size` ranks."""
        self.tallies[axis, op].add(calls, calls * payload_each, calls * wire_bytes(op, payload_each, size))

    def merge(self, other: Counts, times: int = 1) -> None:
        for key, t in other.tallies.items():
            self.tallies[key].add(times * t.calls, times * t.payload_bytes, times * t.wire_bytes)

    def since(self, earlier: Counts) -> Counts:
        """What was added after `earlier` was copied."""
        result = Counts()
        result.merge(self)
        result.merge(earlier, -1)
        return result

    def copy(self) -> Counts:
        return self.since(Counts())

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """{axis: {op: {calls, payload_bytes, wire_bytes}}}, sorted, empty tallies left out."""
        result: dict[str, dict[str, dict[str, int]]] = {}
        for (axis, op), tally in sorted(self.tallies.items()):
            if tally.calls:
                result.setdefault(axis, {})[op] = tally.as_dict()
        return result

    def differences(self, expected: Counts) -> list[str]:
        """Human-readable differences in calls and payload; empty when equal."""
        lines = []
        for axis, op in sorted(set(self.tallies) | set(expected.tallies)):
            got, want = self.tallies.get((axis, op), Tally()), expected.tallies.get((axis, op), Tally())
            if (got.calls, got.payload_bytes) != (want.calls, want.payload_bytes):
                lines.append(
                    f"{axis} {op}: issued {got.calls} calls, {got.payload_bytes} payload bytes; "
                    f"declared {want.calls} calls, {want.payload_bytes} payload bytes"
                )
        return lines


def total(parts: Iterable[Counts]) -> Counts:
    """Sum of several counts."""
    result = Counts()
    for part in parts:
        result.merge(part)
    return result


class EventFile:
    """events.rank*.jsonl: a header line, then one row per step with what the step communicated.

    Opened for appending: a resumed run writes another header with its attempt.
    """

    def __init__(self, path: Path, rank: int, coords: dict[str, int], attempt: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._write({"schema": SCHEMA, "rank": rank, "coords": coords, "attempt": attempt})

    def step(self, step: int, phase: str, step_s: float, comm: Counts) -> None:
        """One row: what was communicated in `phase` during step `step` (1-based)."""
        self._write({"step": step, "phase": phase, "step_s": round(step_s, 6), "comm": comm.as_dict()})

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
        self._file.flush()  # a rank that dies leaves what it had
