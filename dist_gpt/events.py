"""Records of what was communicated, and how they are counted. Torch-free: the report reads them too.

Payload is the full tensor (all-gather and reduce-scatter: the unsharded one; all-reduce once; a send its own, a
receive 0). Wire bytes are what one rank puts on the wire in the ring algorithm: floor(factor x payload) per call,
with the factors of nccl-tests (doc/PERFORMANCE.md).
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
"""First number of a row of the profiling window: a collective, or an entry of the step list."""
CALL_COLUMNS = (
    "step", "index", "channel", "op", "payload", "issue", "issued", "done", "wait", "waited", "cpu", "flags",
)  # fmt: skip
SPAN_COLUMNS = ("step", "index", "start", "wall", "cpu")
EMULATED, BOUND, ESTIMATED, DIRECT = 1, 2, 4, 8
"""Flags of a call: the backend has no such operation and another one did its work; `done` is an upper bound; `done` is
when this rank went on, less the time it was ready and had no processor: it can lie a little early; every member sent
every other one its part, and none went round a ring."""


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


DIRECT_BYTES = 1 << 22


def scatters_directly(payload: int, size: int) -> bool:
    """Whether members of a gloo group send each other the parts of a reduce-scatter of `payload` bytes themselves: half
    the copies of its all-to-all, and for small messages between many more waking up."""
    return size == 2 or payload >= DIRECT_BYTES


NEAR_MEMBERS = 128
"""Most members of a group on one node that read each other's memory: each holds a socket for every other one."""


def scatter_room(payload: int, size: int) -> int:
    """Bytes of the receive buffer that a reduce-scatter of `payload` bytes needs on gloo; see comm.group."""
    return payload // size * (size - 1) if scatters_directly(payload, size) else payload


def leaving_bytes(
    op: str, payload: int, ranks: Sequence[int], index: int, node_of: Sequence[int], emulated: bool = False
) -> int:
    """Bytes that member `index` of the group `ranks` sends to other nodes for one call; node_of[rank] is its node.

    all_reduce, all_gather, reduce_scatter, broadcast go round a ring in the order of `ranks`: all wire bytes of a
    member go to the next one, so wire_bytes(op, payload, n) if that one is on another node, else 0. (Round the other
    way other members cross, but as many in each node, so the sum over a node is the same.) all_to_all, and an
    `emulated` reduce_scatter, which is one: payload / n to each member, so floor(payload x members elsewhere / n).
    send: payload, if the other of the pair is elsewhere.
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
    """Bytes that `rank` sent to other nodes, {phase: bytes}.

    `by_channel`: {"channel", "phase", "op", "calls", "payload_bytes"} with the payload of all its calls; `channels`:
    {"axis"}, and "ranks" of a pair; `groups`: the ranks that `rank` meets along each other axis. Where a payload does
    not divide evenly the sum may be larger than the calls' own by less than a byte a call.
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


def moved_by_engine(engine: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, float]]:
    """(axis, operation, calls, payload bytes, wire bytes) of a training step, as the fact `engine` has them: what an
    engine that communicates by itself counted."""
    steps = max(1, engine["steps"])
    for axis, ops in (engine["traffic"].get(TRAIN) or {}).items():
        for op, row in ops.items():
            yield axis, op, row["calls"] / steps, row["payload_bytes"] / steps, row["wire_bytes"] / steps


class EventFile:
    """events.rank*.jsonl: a header, then facts (objects) and, inside the profiling window, rows (arrays of numbers).

    Opened for appending: a resumed run writes another header with its attempt. Times in rows are ns since `base_ns` of
    this rank's CLOCK_MONOTONIC. What a fact holds is described in docs/events.md.
    """

    def __init__(self, path: Path, rank: int, coords: dict[str, int], attempt: int, **header: Any) -> None:
        self._file = path.open("a", encoding="utf-8")
        self.base_ns = time.perf_counter_ns()
        clock = {"base_ns": self.base_ns, "unix_s": time.time()}
        self._write([{"schema": SCHEMA, "rank": rank, "coords": coords, "attempt": attempt, **clock, **header}])

    def step(self, step: int, phase: str, step_s: float, comm: Counts, **more: Any) -> None:
        """What was communicated in `phase` during step `step` (1-based)."""
        self._write([{"step": step, "phase": phase, "step_s": round(step_s, 9), "comm": comm.as_dict(), **more}])

    def fact(self, name: str, content: dict[str, Any]) -> None:
        """One line {name: content}."""
        self._write([{name: content}])

    def rows(self, rows: Sequence[Sequence[int]]) -> None:
        """Rows of the window, one to a line."""
        if rows:
            text = json.dumps(rows, separators=(",", ":"))  # all at once: a third of the time of one after the other
            self._put(text[1:-1].replace("],[", "]\n[") + "\n")

    def close(self) -> None:
        self._file.close()

    def _write(self, lines: Iterable[Any]) -> None:
        self._put("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

    def _put(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()  # a rank that dies leaves what it had
