"""Write trace.json.gz: the profiled steps for Perfetto, chrome://tracing and analysers of torch.profiler traces.

Each rank is a process, with lanes in which nothing overlaps (in `steps` events nest):

    steps      ProfilerStep#12, in it the entries of the step list, in these the calls that issue something
    compute    what the rank computed, by entry; with gaps where it was blocked
    blocked    those gaps: waiting for the last member, transfer, woken late, named like the budget's categories
    tp, pp ..  every collective and message of an axis, from issue to end (`tp 2` for concurrent ones)

and with the bytes in flight as a counter. Arrows go from SEND to RECV. Collectives carry what torch.profiler (Kineto)
writes for NCCL kernels, names included, whatever the backend was: HTA, PARAM and TraceLens look for exactly that. They
read one file per rank, which `write_trace(..., ranks=[r])` makes.

The file is written as a stream in a fixed order and holds no date: the same run gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_gpt.events import OPS
from dist_gpt.report.analysis.replay import LATE, flatten
from dist_gpt.report.read.nccl import Call, Nccl, calls_at
from dist_gpt.report.units import count_of

if TYPE_CHECKING:
    from dist_gpt.report.analysis.clocks import Clocks
    from dist_gpt.report.analysis.match import Calls, Meetings
    from dist_gpt.report.read.load import RankLog, Run

MAX_RANKS, MAX_ROWS = 64, 60_000
"""Most ranks and rows in a trace, since viewers fail on gigabytes; `otherData` says what is left out."""
STEPS, COMPUTE, BLOCKED, FIRST_AXIS = 0, 1, 2, 10
"""Lanes (tids); those of the axes follow in order, `LANES` apart."""
LANES = 16
"""Most lanes of one axis; calls that would need another one are left out and counted."""
ARROWS = frozenset({"pp"})
BUFFER_BYTES = 1 << 20
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_COMPUTE_STREAM = 7  # CUDA's default stream in Kineto's traces

_SEND, _RECV = OPS.index("send"), OPS.index("recv")


def write_trace(
    path: Path,
    run: Run,
    clocks: Clocks,
    calls: Calls,
    meetings: Meetings,
    extra: Iterable[dict[str, Any]] = (),
    *,
    ranks: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    arrows: frozenset[str] = ARROWS,
) -> dict[str, int]:
    """Write the trace; return {events, bytes}, the latter compressed.

    `extra` are finished events (`kineto.read(...).lanes`), in microseconds since the clocks' origin. `ranks` and
    `steps` default to whole replicas of the model and to all profiled steps, as many as the limits allow. `arrows`:
    axes whose meetings are joined by arrows.
    """
    chosen = list(ranks) if ranks is not None else _choose_ranks(run)
    wanted = list(steps) if steps is not None else _choose_steps(run, chosen)
    writer = _Writer(run, clocks, calls, meetings, chosen, wanted, arrows)
    events = chain(writer.names(), writer.arrow_events(), *map(writer.rank_events, chosen), writer.moved(extra))
    count = 0
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed,
        io.BufferedWriter(packed, BUFFER_BYTES) as file,
    ):
        file.write(writer.header())
        for event in events:
            file.write(b",\n" if count else b"\n")
            file.write(event)
            count += 1
        file.write(b"\n]}\n")
    return {"events": count, "bytes": path.stat().st_size}


def _choose_ranks(run: Run) -> list[int]:
    """Return at most MAX_RANKS that recorded something, replica by replica, so that messages have both their ends."""
    at = {rank: run.layout.coords(rank) for rank in run.ranks}
    return sorted(sorted(at, key=lambda rank: (at[rank].dp, at[rank].cp, rank))[:MAX_RANKS])


def _choose_steps(run: Run, ranks: list[int]) -> list[int]:
    """Return the first profiled steps, at least one and at most MAX_ROWS rows of the chosen ranks."""
    rows: dict[int, int] = {}
    for rank in ranks:
        log = run.ranks[rank]
        for step, count in zip(
            *np.unique(np.concatenate([log.calls[:, 0], log.spans[:, 0]]), return_counts=True), strict=True
        ):
            rows[int(step)] = rows.get(int(step), 0) + int(count)
    kept: list[int] = []
    total = 0
    for step in sorted(rows):
        total += rows[step]
        if kept and total > MAX_ROWS:
            break
        kept.append(step)
    return kept


def _shown(calls: Calls, meetings: Meetings, rank: int, steps: list[int]) -> list[Call]:
    """Return a rank's calls in the chosen steps, by time of issue."""
    where = calls.of(rank)
    rows = np.arange(where.start, where.stop)[np.isin(calls.step[where], steps)]
    return calls_at(calls, meetings, rows[np.argsort(calls.issue[rows], kind="stable")])


def _encode(event: dict[str, Any]) -> bytes:
    return _ENCODER.encode(event).encode("ascii")


@dataclass
class _Lane:
    """Lane of an axis, in use until `end`."""

    tid: int
    end: int = -(1 << 62)


class _Part(NamedTuple):
    """Owner of a piece of time: an entry, by position, or a call that issues or waits."""

    entry: int = -1
    call: Call | None = None
    issuing: bool = False


class _Writer:
    """Maker of the events of the chosen ranks and steps.

    Times are ns since the trace's zero: the clocks' origin, or the first event if that lies before it.
    """

    def __init__(
        self,
        run: Run,
        clocks: Clocks,
        calls: Calls,
        meetings: Meetings,
        ranks: list[int],
        steps: list[int],
        arrows: frozenset[str],
    ) -> None:
        self.run, self.clocks, self.channels = run, clocks, calls.channels
        self.ranks, self.steps, self.arrows = ranks, steps, arrows
        self.nccl = Nccl(run.config.train.dtype, calls.channels)
        self.axes = {axis: i for i, axis in enumerate(calls.axes)}
        self.correlation = len(calls)  # ids up to here are the calls'
        self.calls = {rank: _shown(calls, meetings, rank, steps) for rank in ranks}
        self.zero = min([0, *(found[0].issue for found in self.calls.values() if found), *self._starts()])
        self.lanes: dict[int, dict[int, str]] = {}  # rank -> tid -> name
        self.tid = {rank: self._place(rank) for rank in ranks}  # rank -> row -> tid

    def moved(self, events: Iterable[dict[str, Any]]) -> Iterator[bytes]:
        """Yield events in microseconds since the clocks' origin, shifted to the trace's zero, without earlier ones."""
        for event in events:
            moment = round(event.get("ts", 0.0) - self.zero / 1000, 3)
            if moment >= 0:
                yield _encode({**event, "ts": moment})

    def _starts(self) -> list[int]:
        """Return the start of every rank's first chosen step."""
        return [start for rank in self.ranks for _, start, _ in self._step_facts(rank)[:1]]

    def _place(self, rank: int) -> dict[int, int]:
        """Return each call's lane (row -> tid), such that no two in a lane overlap; lanes fill from the first on."""
        names = {STEPS: "steps", COMPUTE: "compute", BLOCKED: "blocked"}
        lanes: dict[str, list[_Lane]] = {axis: [] for axis in self.axes}
        placed = {}
        for call in self.calls[rank]:
            axis = self.channels[call.gid][0]
            mine = lanes[axis]
            lane = next((lane for lane in mine if lane.end <= call.issue), None)
            if lane is None and len(mine) < LANES:
                lane = _Lane(FIRST_AXIS + self.axes[axis] * LANES + len(mine))
                names[lane.tid] = axis if not mine else f"{axis} {len(mine) + 1}"
                mine.append(lane)
            if lane is not None:
                lane.end = max(call.end, call.issue + 1)
                placed[call.row] = lane.tid
        self.lanes[rank] = names
        return placed

    # --- header and names ------------------------------------------------------------------------------------------

    def header(self) -> bytes:
        """Return everything but the events, with the spaces that HTA's search for the rank expects."""
        first = self.run.ranks[self.ranks[0]].header if self.ranks else {}
        backend, rank = first.get("backend") or "", self.ranks[0] if self.ranks else 0
        head = {
            "schemaVersion": 1,
            "displayTimeUnit": "ms",
            "baseTimeNanoseconds": self._base_ns(),
            "distributedInfo": self.nccl.header(backend, rank, self.run.layout.world),
            "deviceProperties": [],
            "otherData": self._other(),
        }
        return (json.dumps(head)[:-1] + ', "traceEvents": [').encode("ascii")

    def _base_ns(self) -> int:
        """Return the Unix time of the trace's zero in ns, as Kineto has it; 0 if rank 0 did not record it."""
        log = self.run.ranks.get(0)
        if log is None or log.header.get("unix_s") is None:
            return 0
        return round(log.header["unix_s"] * 1e9) + self.zero + self.clocks.origin - log.header["base_ns"]

    def _other(self) -> dict[str, str]:
        """Return a summary of what is in the file and what is left out."""
        profiled = {int(step) for log in self.run.ranks.values() for step in np.unique(log.spans[:, 0])}
        lost = sum(map(len, self.calls.values())) - sum(map(len, self.tid.values()))
        left_out = []
        if len(self.ranks) < len(self.run.ranks):
            left_out.append(f"{len(self.run.ranks) - len(self.ranks)} of {len(self.run.ranks)} ranks")
        if missing := sorted(profiled - set(self.steps)):
            left_out.append(f"steps {', '.join(map(str, missing))}")
        if lost:
            left_out.append(f"{count_of(lost, 'call')} beyond {LANES} at the same time on one axis")
        return {
            "producer": "dist_gpt",
            "run": self.run.config.name,
            "steps": ", ".join(map(str, self.steps)),
            "left out": "; ".join(left_out) or "nothing",
            "kernel names": "those of NCCL, whatever the backend, so that analysers of torch.profiler traces find them",
        }

    def names(self) -> Iterator[bytes]:
        """Yield the metadata: names and order of processes and lanes."""
        for rank in self.ranks:
            host = self.run.ranks[rank].header.get("host")
            title = f"rank {rank} ({self.run.layout.coords(rank)})" + (f" on {host}" if host else "")
            for key, value in (
                ("process_name", {"name": title}),
                ("process_labels", {"labels": str(self.run.ranks[rank].header.get("device") or "")}),
                ("process_sort_index", {"sort_index": rank}),
            ):
                yield _encode({"ph": "M", "name": key, "pid": rank, "tid": 0, "ts": 0, "args": value})
            for tid, name in sorted(self.lanes[rank].items()):
                for key, value in (("thread_name", {"name": name}), ("thread_sort_index", {"sort_index": tid})):
                    yield _encode({"ph": "M", "name": key, "pid": rank, "tid": tid, "ts": 0, "args": value})

    # --- what a rank did -------------------------------------------------------------------------------------------

    def _event(self, name: str, cat: str, rank: int, tid: int, start: int, end: int, args: dict[str, Any]) -> bytes:
        times = {"ts": (start - self.zero) / 1000, "dur": (end - start) / 1000}
        return _encode({"ph": "X", "cat": cat, "name": name, "pid": rank, "tid": tid, **times, "args": args})

    def rank_events(self, rank: int) -> Iterator[bytes]:
        """Yield a rank's steps, entries, computing, blocked times, collectives, bytes in flight and device samples."""
        for step, start, end in self._step_facts(rank):
            yield self._event(f"ProfilerStep#{step}", "user_annotation", rank, STEPS, start, end, {"step": step})
        yield from self._own_time(rank)
        for call in self.calls[rank]:
            if (tid := self.tid[rank].get(call.row)) is not None:
                title, args = self.nccl.kernel(call, rank, tid)
                launch = {"correlation": args["correlation"], "External id": args["External id"]}
                name = f"issue {args['Collective name']}"
                yield self._event(name, "cuda_runtime", rank, STEPS, call.issue, call.issued, launch)
                yield self._event(title, "kernel", rank, tid, call.issue, call.end, args)
        yield from self._under_way(rank)
        yield from self._samples(rank)

    def _step_facts(self, rank: int) -> list[tuple[int, int, int]]:
        """Return (step, start, end) of the chosen training steps; none overlaps the next."""
        facts = []
        for fact in self.run.ranks[rank].steps:
            if fact["phase"] == "train" and fact["step"] in self.steps and fact.get("start_ns") is not None:
                t = np.array([fact["start_ns"], fact["start_ns"] + round(fact["step_s"] * 1e9)], dtype=np.int64)
                start, end = self.clocks.to_origin(rank, t).tolist()
                facts.append((int(fact["step"]), start, end))
        facts.sort(key=lambda fact: fact[1])
        nexts = [*(start for _, start, _ in facts[1:]), 1 << 62][: len(facts)]
        return [
            (step, start, max(start, min(end, after))) for (step, start, end), after in zip(facts, nexts, strict=True)
        ]

    def _own_time(self, rank: int) -> Iterator[bytes]:
        """Yield the entries of the step list, what the rank computed in them, and where it was blocked."""
        log: RankLog = self.run.ranks[rank]
        spans = log.spans[np.isin(log.spans[:, 0], self.steps)]
        steps = self.run.plan_of(rank).steps
        start = self.clocks.to_origin(rank, spans[:, 2]).tolist()
        end = self.clocks.to_origin(rank, spans[:, 2] + spans[:, 3]).tolist()
        described = []
        for (step, index), begin, until in zip(spans[:, :2].tolist(), start, end, strict=True):
            entry = steps[index] if 0 <= index < len(steps) else None
            self.correlation += 1
            described.append((str(entry or "data"), {"step": step, "entry": index, "correlation": self.correlation}))
            yield self._event(described[-1][0], "cpu_op", rank, STEPS, begin, until, described[-1][1])

        pieces: list[tuple[int, int, _Part]] = [
            (begin, until, _Part(entry=i)) for i, (begin, until) in enumerate(zip(start, end, strict=True))
        ]
        for call in self.calls[rank]:
            pieces.append((call.issue, call.issued, _Part(call=call, issuing=True)))
            if 0 <= call.wait < call.waited:
                pieces.append((call.wait, call.waited, _Part(call=call)))
        for piece in flatten(pieces):
            if piece.label.call is not None:
                yield from self._blocked(rank, piece.label.call, piece.label.issuing, piece.start, piece.end)
                continue
            name, args = described[piece.label.entry]
            device = {"stream": _COMPUTE_STREAM, "device": rank} if args["entry"] >= 0 else {}
            cat = "kernel" if device else "data"
            yield self._event(name, cat, rank, COMPUTE, piece.start, piece.end, {**args, **device})

    def _blocked(self, rank: int, call: Call, issuing: bool, start: int, end: int) -> Iterator[bytes]:
        """Yield a blocked time, cut where the last member came and where the meeting was over for this rank."""
        axis = self.channels[call.gid][0]
        args = {"op": OPS[call.op], "axis": axis, "payload bytes": call.payload, "came last": call.culprit}
        transfer = f"transfer.{axis}"
        if issuing:
            yield self._event(transfer, "blocked", rank, BLOCKED, start, end, {**args, "issuing": True})
            return
        arrival = min(max(call.arrival, start), end)
        over = min(max(call.over, arrival), end)
        waiting = "bubble" if call.op == _RECV and axis == "pp" else f"wait.{axis}"
        for name, begin, until in ((waiting, start, arrival), (transfer, arrival, over), (LATE, over, end)):
            if until > begin:
                yield self._event(name, "blocked", rank, BLOCKED, begin, until, args)

    def _under_way(self, rank: int) -> Iterator[bytes]:
        """Yield a counter of the bytes of collectives and messages between issue and end."""
        changes: dict[int, int] = {}
        for call in self.calls[rank]:
            for moment, change in ((call.issue, call.payload), (call.end, -call.payload)):
                changes[moment] = changes.get(moment, 0) + change
        level = 0
        for moment in sorted(changes):
            if changes[moment]:
                level += changes[moment]
                yield self._counter("bytes under way", rank, moment, {"bytes": level})

    def _samples(self, rank: int) -> Iterator[bytes]:
        """Yield counters of a GPU's clock, power and temperature."""
        names = {"sm_clock_hz": "SM clock (Hz)", "power_w": "power (W)", "temperature_c": "temperature (C)"}
        samples = self.run.ranks[rank].samples
        moments = self.clocks.to_origin(rank, np.array([s["at_ns"] for s in samples], dtype=np.int64)).tolist()
        for sample, moment in zip(samples, moments, strict=True):
            for key, name in names.items():
                if sample.get(key) is not None and moment >= self.zero:
                    yield self._counter(name, rank, moment, {"value": sample[key]})

    def _counter(self, name: str, rank: int, moment: int, values: dict[str, Any]) -> bytes:
        return _encode(
            {"ph": "C", "name": name, "pid": rank, "tid": 0, "ts": (moment - self.zero) / 1000, "args": values}
        )

    # --- arrows ------------------------------------------------------------------------------------------------------

    def arrow_events(self) -> Iterator[bytes]:
        """Yield arrows from the member that came last (of a message, the sender) to the end of every other one."""
        met: dict[int, list[tuple[int, Call]]] = {}
        for rank, found in self.calls.items():
            for call in found:
                if call.meeting >= 0 and self.channels[call.gid][0] in self.arrows and call.row in self.tid[rank]:
                    met.setdefault(call.meeting, []).append((rank, call))
        for meeting, members in sorted(met.items()):
            source = next((m for m in members if m[1].op == _SEND), None)
            source = source or next((m for m in members if m[0] == m[1].culprit), None)
            if source is None:
                continue
            name = f"{self.channels[source[1].gid][0]} {OPS[source[1].op]}"
            for k, (rank, call) in enumerate(m for m in members if m is not source):
                # Just inside the slice that it points at: viewers bind an arrow to the slice around its end.
                end = max(call.issue, call.end - 1, source[1].issue)
                identity = f"{meeting}.{k}"
                yield self._arrow("s", name, identity, source[0], self.tid[source[0]][source[1].row], source[1].issue)
                yield self._arrow("f", name, identity, rank, self.tid[rank][call.row], end)

    def _arrow(self, ph: str, name: str, identity: str, rank: int, tid: int, moment: int) -> bytes:
        bind = {"bp": "e"} if ph == "f" else {}
        place = {"pid": rank, "tid": tid, "ts": (moment - self.zero) / 1000}
        return _encode({"ph": ph, "cat": "message", "name": name, "id": identity, **place, **bind})
