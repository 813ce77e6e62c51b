"""Records and counts of communication. Torch-free: the report reads them too.

Payload is the full tensor (all-gather and reduce-scatter: the unsharded one; all-reduce: counted once; send: the
message; receive: 0). Wire bytes are those that one rank sends in the ring algorithm: floor(factor x payload) per call,
with the factors of nccl-tests (its doc/PERFORMANCE.md).
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 2
TRAIN, EVAL, SAVE, CONTROL = "train", "eval", "save", "control"
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "barrier")
CALL, SPAN = 1, 2
"""First number of a row of the profiling window: CALL for a collective, SPAN for an entry of the step list."""
CALL_COLUMNS = (
    "step", "index", "channel", "op", "payload", "issue", "issued", "done", "wait", "waited", "cpu", "flags",
)  # fmt: skip
SPAN_COLUMNS = ("step", "index", "start", "wall", "cpu")
EMULATED, BOUND, ESTIMATED, DIRECT = 1, 2, 4, 8
"""Flags of a call. EMULATED: another operation replaces one that the backend lacks. BOUND: `done` is an upper bound.
ESTIMATED: `done` is when this rank continued, less the time it was ready but had no core, so it can be slightly early.
DIRECT: every member exchanged parts directly with every other one, without a ring."""


def wire_bytes(op: str, payload: int, size: int) -> int:
    """Return the bytes that one rank of a group of `size` sends for one call of `op` on `payload` bytes."""
    if op == "all_reduce":
        return 2 * (size - 1) * payload // size
    if op in ("all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        return (size - 1) * payload // size
    if op == "send":
        return payload
    if op in ("recv", "barrier"):
        return 0
    raise ValueError(f"unknown collective {op!r}")


DIRECT_BYTES = 1 << 22


def scatters_directly(payload: int, size: int) -> bool:
    """Return whether a gloo group sends the parts of a reduce-scatter of `payload` bytes directly between its members.

    This takes half the copies of gloo's all-to-all, but more wake-ups for small messages between many ranks.
    """
    return size == 2 or payload >= DIRECT_BYTES


NEAR_MEMBERS = 128
"""Largest group on one node whose members read each other's memory: each holds a socket to every other one."""


def scatter_room(payload: int, size: int) -> int:
    """Return the bytes of the receive buffer that a reduce-scatter of `payload` bytes needs on gloo; see comm.group."""
    return payload // size * (size - 1) if scatters_directly(payload, size) else payload


def leaving_bytes(
    op: str, payload: int, ranks: Sequence[int], index: int, node_of: Sequence[int], emulated: bool = False
) -> int:
    """Return the bytes that member `index` of group `ranks` sends to other nodes per call; node_of[rank] is its node.

    all_reduce, all_gather, reduce_scatter, broadcast go round a ring in the order of `ranks`: all wire bytes of a
    member go to the next one, so wire_bytes(op, payload, n) if that one is on another node, else 0. (In the other
    direction other members cross, but as many in each node, so the sum over a node is the same.) all_to_all, and an
    `emulated` reduce_scatter, which is one: payload / n to each member, so floor(payload x members elsewhere / n).
    send: payload, if the other rank of the pair is on another node.
    """
    n, here = len(ranks), node_of[ranks[index]]
    if op == "all_to_all" or (op == "reduce_scatter" and emulated):
        return payload * sum(node_of[rank] != here for rank in ranks) // n
    return wire_bytes(op, payload, n) if node_of[ranks[(index + 1) % n]] != here else 0


def leaving_total(
    by_channel: Iterable[Mapping[str, Any]],
    channels: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[int]],
    rank: int,
    node_of: Sequence[int],
    emulated: bool = False,
) -> dict[str, int]:
    """Return the bytes that `rank` sent to other nodes, {phase: bytes}.

    `by_channel`: {"channel", "phase", "op", "calls", "payload_bytes"}, the payload being that of all its calls;
    `channels`: {"axis"}, and "ranks" for a pair; `groups`: the ranks that `rank` meets along each other axis. Where a
    payload does not divide evenly, the result may exceed the sum over single calls by less than a byte per call.
    """
    found: dict[str, int] = defaultdict(int)
    for row in by_channel:
        channel = channels[row["channel"]]
        ranks = channel.get("ranks") or groups[channel["axis"]]
        index = list(ranks).index(rank)
        found[row["phase"]] += leaving_bytes(row["op"], row["payload_bytes"], ranks, index, node_of, emulated)
    return dict(found)


@dataclass(slots=True)
class Tally:
    """Calls, payload bytes and wire bytes of one (axis, op)."""

    calls: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0

    def add(self, calls: int, payload: int, wire: int) -> None:
        """Add `calls` collectives with their payload and wire bytes in total."""
        self.calls += calls
        self.payload_bytes += payload
        self.wire_bytes += wire

    def as_dict(self) -> dict[str, int]:
        """Return {calls, payload_bytes, wire_bytes}."""
        return {"calls": self.calls, "payload_bytes": self.payload_bytes, "wire_bytes": self.wire_bytes}


class Counts:
    """Tallies by (axis, op): the common form of plan, ledger and dry run."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)

    def add(self, axis: str, op: str, calls: int, payload_each: int, size: int) -> None:
        """Count `calls` collectives of `payload_each` bytes in a group of `size` ranks."""
        self.tallies[axis, op].add(calls, calls * payload_each, calls * wire_bytes(op, payload_each, size))

    def merge(self, other: Counts, times: int = 1) -> None:
        """Add `times` x `other`."""
        for key, t in other.tallies.items():
            self.tallies[key].add(times * t.calls, times * t.payload_bytes, times * t.wire_bytes)

    def since(self, earlier: Counts) -> Counts:
        """Return the counts less those of `earlier`, a copy taken before."""
        result = Counts()
        result.merge(self)
        result.merge(earlier, -1)
        return result

    def copy(self) -> Counts:
        """Return an independent copy."""
        return self.since(Counts())

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return {axis: {op: {calls, payload_bytes, wire_bytes}}}, sorted, without empty tallies."""
        result: dict[str, dict[str, dict[str, int]]] = {}
        for (axis, op), tally in sorted(self.tallies.items()):
            if tally.calls:
                result.setdefault(axis, {})[op] = tally.as_dict()
        return result

    def differences(self, expected: Counts) -> list[str]:
        """Return the differences from `expected` in calls and payload, as sentences; empty if equal."""
        lines = []
        for axis, op in sorted(set(self.tallies) | set(expected.tallies)):
            got, want = self.tallies.get((axis, op), Tally()), expected.tallies.get((axis, op), Tally())
            if (got.calls, got.payload_bytes) != (want.calls, want.payload_bytes):
                lines.append(
                    f"{axis} {op}: issued {_calls(got.calls)}, {got.payload_bytes} payload bytes; "
                    f"declared {_calls(want.calls)}, {want.payload_bytes} payload bytes"
                )
        return lines


def _calls(count: int) -> str:
    return f"{count} call{'' if count == 1 else 's'}"


def total(parts: Iterable[Counts]) -> Counts:
    """Return the sum of several counts."""
    result = Counts()
    for part in parts:
        result.merge(part)
    return result


def moved_by_engine(engine: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, float]]:
    """Yield (axis, operation, calls, payload bytes, wire bytes) of one training step from the fact `engine`.

    They are the counts of an engine that issues its own communication, per step of the attempt.
    """
    steps = max(1, engine["steps"])
    for axis, ops in (engine["traffic"].get(TRAIN) or {}).items():
        for op, row in ops.items():
            yield axis, op, row["calls"] / steps, row["payload_bytes"] / steps, row["wire_bytes"] / steps


class EventFile:
    """Writer of events.rank*.jsonl: a header, facts (objects), and rows (arrays of numbers) in the profiling window.

    The file is opened for appending: a resumed run writes another header with its attempt. Times in rows are ns since
    `base_ns` on this rank's CLOCK_MONOTONIC. docs/events.md describes the facts.
    """

    def __init__(self, path: Path, rank: int, coords: dict[str, int], attempt: int, **header: Any) -> None:
        self._file = path.open("a", encoding="utf-8")
        self.base_ns = time.perf_counter_ns()
        clock = {"base_ns": self.base_ns, "unix_s": time.time()}
        self._write([{"schema": SCHEMA, "rank": rank, "coords": coords, "attempt": attempt, **clock, **header}])

    def step(self, step: int, phase: str, step_s: float, comm: Counts, **more: Any) -> None:
        """Write the duration in seconds and the communication of `phase` in step `step`, counted from 1."""
        self._write([{"step": step, "phase": phase, "step_s": round(step_s, 9), "comm": comm.as_dict(), **more}])

    def fact(self, name: str, content: dict[str, Any]) -> None:
        """Write one line {name: content}."""
        self._write([{name: content}])

    def rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Write rows of the profiling window, one per line."""
        if rows:
            text = json.dumps(rows, separators=(",", ":"))  # one call takes a third of the time of one call per row
            self._put(text[1:-1].replace("],[", "]\n[") + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, lines: Iterable[Any]) -> None:
        self._put("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()  # so that the lines of a rank that dies are kept
