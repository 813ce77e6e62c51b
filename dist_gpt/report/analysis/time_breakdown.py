"""Time budget of every rank's step: each nanosecond is in exactly one category, by construction.

A rank's step is cut at its own timestamps. A moment is either blocked by a call (in the issuing call, or in the wait
for it), or not blocked and inside an entry of the step list, or in neither.

    blocked before the last member arrived  wait.AXIS; for a pipeline's receive: bubble
    ... and until this rank's part ended    transfer.AXIS (with the local part of an emulated operation)
    ... and until this rank resumed         descheduled: the operating system had not woken it
    in an entry, not blocked                forward, backward, weight, recompute, optimizer, data: the thread's CPU time
    ... and not on a CPU                    descheduled (CPU runs only; a GPU runs what it is given)
    in neither, not on a CPU                descheduled (CPU runs only)
    in neither                              unexplained

The drain of a pipeline is bubble too: the wait in any collective after a rank's own last action, until the last action
of its pipeline ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_gpt.events import BOUND, EMULATED, OPS, SPAN_COLUMNS
from dist_gpt.report.analysis.clocks import Clocks
from dist_gpt.report.analysis.match import Calls, Meetings
from dist_gpt.report.read.load import Run
from dist_gpt.schedule.expand import BACKWARD, FORWARD, FREE, GATHER, RECOMPUTE, RECV, REDUCE, SEND, UPDATE, WEIGHT

COMPUTE = ("forward", "backward", "weight", "recompute", "optimizer")
ALWAYS = ("bubble", "data", "checkpoint", "descheduled", "unexplained")
KINDS = ("forward", "backward", "weight", "recompute", "optimizer", "data", "message")
"""Kinds of spans, by number. Time in a message's entry outside of its call is left unexplained."""
_KIND = {FORWARD: 0, BACKWARD: 1, WEIGHT: 2, RECOMPUTE: 3, REDUCE: 4, UPDATE: 4, GATHER: 4, FREE: 4, SEND: 6, RECV: 6}
_DATA, _MESSAGE, _OPTIMIZER = KINDS.index("data"), KINDS.index("message"), KINDS.index("optimizer")
_RECV = OPS.index("recv")


@dataclass
class Spans:
    """Entries of all ranks' step lists, by rank and start; times in aligned ns. Those of one rank do not overlap."""

    rank: np.ndarray
    step: np.ndarray
    index: np.ndarray
    start: np.ndarray
    end: np.ndarray
    cpu: np.ndarray
    kind: np.ndarray  # into KINDS
    bounds: dict[int, slice]

    def of(self, rank: int) -> slice:
        """Return the slice of a rank's spans."""
        return self.bounds.get(rank, slice(0, 0))


def read_spans(run: Run, clocks: Clocks) -> Spans:
    """Return all spans of the window on the common clock."""
    total = sum(len(log.spans) for log in run.ranks.values())
    column = {name: np.empty(total, np.int64) for name in ("rank", "step", "index", "start", "end", "cpu", "kind")}
    bounds, at = {}, 0
    for rank, log in run.ranks.items():
        here = slice(at, at + len(log.spans))
        rows = dict(zip(SPAN_COLUMNS, log.spans[np.argsort(log.spans[:, 2], kind="stable")].T, strict=True))
        kinds = np.array([*(_KIND[s.kind] for s in run.plan_of(rank).steps), _DATA])  # the last one is for index -1
        column["rank"][here] = rank
        column["start"][here] = clocks.to_origin(rank, rows["start"])
        column["end"][here] = column["start"][here] + rows["wall"]
        column["kind"][here] = kinds[rows["index"]]
        for name in ("step", "index", "cpu"):
            column[name][here] = rows[name]
        bounds[rank] = here
        at = here.stop
    return Spans(**column, bounds=bounds)


@dataclass
class Blocked:
    """Nanoseconds for which each call blocked its rank, by cause; `cpu`: CPU time in ns used meanwhile."""

    wait: np.ndarray
    bubble: np.ndarray
    transfer: np.ndarray
    late: np.ndarray
    cpu: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Nanoseconds blocked per call, whatever the cause."""
        return self.wait + self.bubble + self.transfer + self.late


def blocked(run: Run, calls: Calls, meetings: Meetings, spans: Spans) -> Blocked:
    """Split the time for which every call blocked its rank by cause."""
    waited = (calls.wait >= 0) & (calls.waited >= 0)
    begin = np.where(waited, calls.wait, 0)
    end = np.where(waited, np.maximum(calls.waited, calls.wait), 0)
    met = calls.meeting >= 0
    arrival = np.where(met, meetings.arrival[np.maximum(calls.meeting, 0)], calls.issue) if len(meetings) else begin
    done = np.where(calls.done >= 0, calls.done, end)
    if len(meetings):  # for a receive the backend gives only a bound; its sender knows the end
        known = met & (calls.flags & BOUND > 0) & (meetings.end[np.maximum(calls.meeting, 0)] >= 0)
        done = np.where(known, meetings.end[np.maximum(calls.meeting, 0)], done)
    over = np.clip(done, begin, end)  # when this rank's part ended
    before = np.clip(np.minimum(over, arrival) - begin, 0, None)
    after = end - over
    local = np.where((calls.flags & EMULATED) > 0, np.minimum(after, calls.cpu), 0)
    bubble = np.where(calls.op == _RECV, before, np.minimum(before, _drain(run, calls, spans, begin, arrival)))
    issuing = np.clip(calls.issued - calls.issue, 0, None)
    transfer = (end - begin) - before - after + local + issuing
    return Blocked(before - bubble, bubble, transfer, after - local, np.minimum(calls.cpu, end - begin))


def _drain(run: Run, calls: Calls, spans: Spans, begin: np.ndarray, until: np.ndarray) -> np.ndarray:
    """Return, per call, the ns of [begin, until] between its rank's last pipeline action and its pipeline's."""
    own, whole = last_actions(run, spans)
    found = np.zeros(len(calls), np.int64)
    for rank in run.ranks:
        here = calls.of(rank)
        for step in np.unique(calls.step[here]).tolist():
            if (rank, step) in whole:
                rows = np.flatnonzero(calls.step[here] == step) + here.start
                low = np.maximum(begin[rows], own[rank, step])
                found[rows] = np.clip(np.minimum(until[rows], whole[rank, step]) - low, 0, None)
    return found


def last_actions(run: Run, spans: Spans) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Return, by (rank, step), when the rank's last pipeline action ended, and when its whole pipeline's last one did.

    Actions are forward, backward, weight and recompute; times are aligned ns. Both are empty without a pipeline.
    """
    own: dict[tuple[int, int], int] = {}
    if run.layout.pp == 1:
        return own, {}
    compute = spans.kind <= KINDS.index("recompute")
    for rank in run.ranks:
        here = spans.of(rank)
        mask = compute[here]
        steps, ends = spans.step[here][mask], spans.end[here][mask]
        for step in np.unique(steps).tolist():
            own[rank, step] = int(ends[steps == step].max())
    pipelines = {rank: run.layout.group("pp", rank) for rank in run.ranks}
    whole = {(r, s): max(own.get((member, s), 0) for member in pipelines[r]) for r, s in own}
    return own, whole


@dataclass
class Budget:
    """Nanoseconds by (rank, step) and category; `wall` is the sum of all categories.

    `computing` is the time in entries that compute while not blocked, on a CPU or not: what makes other ranks wait.
    """

    ranks: list[int]
    steps: list[int]
    wall: np.ndarray  # (ranks, steps); 0 where a step is not known
    parts: dict[str, np.ndarray]
    computing: np.ndarray

    def mean_s(self) -> dict[str, float]:
        """Return the seconds of each category in a step, mean over ranks and steps."""
        known = self.wall > 0
        return {name: float(part[known].mean()) / 1e9 if known.any() else 0.0 for name, part in self.parts.items()}

    def of_rank_s(self, rank: int) -> dict[str, float]:
        """Return one rank's seconds of each category in a step, mean over steps, with their sum as `wall_s`."""
        row = self.ranks.index(rank)
        known = self.wall[row] > 0
        mean = {name: float(part[row][known].mean()) / 1e9 if known.any() else 0.0 for name, part in self.parts.items()}
        return {"wall_s": float(self.wall[row][known].mean()) / 1e9 if known.any() else 0.0, **mean}


def budget(run: Run, calls: Calls, spans: Spans, stood: Blocked) -> Budget:
    """Return the budget of every profiled step."""
    ranks = list(run.ranks)
    steps = np.union1d(spans.step, calls.step).tolist()  # a rank that died leaves calls without spans
    place = np.zeros(max(ranks, default=0) + 1, np.int64)
    place[ranks] = np.arange(len(ranks))
    shape = (len(ranks), len(steps))
    wall = _walls(run, ranks, steps)

    def summed(rank: np.ndarray, step: np.ndarray, values: np.ndarray) -> np.ndarray:
        cells = place[rank] * len(steps) + np.searchsorted(steps, step)
        return np.bincount(cells, weights=values, minlength=shape[0] * shape[1]).reshape(shape)

    inside, inside_cpu = _inside(calls, spans, stood)
    own = np.clip(spans.end - spans.start - inside, 0, None)
    running = np.minimum(own, np.clip(spans.cpu - inside_cpu, 0, None))
    parts = {}
    for kind, name in enumerate(KINDS[: _DATA + 1]):
        mask = spans.kind == kind
        parts[name] = summed(spans.rank[mask], spans.step[mask], running[mask])
    late = summed(spans.rank, spans.step, own - running)
    parts["descheduled"] = late + summed(calls.rank, calls.step, stood.late)
    parts["bubble"] = summed(calls.rank, calls.step, stood.bubble)
    for number, axis in enumerate(calls.axes):
        mask = calls.axis == number
        parts[f"transfer.{axis}"] = summed(calls.rank[mask], calls.step[mask], stood.transfer[mask])
        parts[f"wait.{axis}"] = summed(calls.rank[mask], calls.step[mask], stood.wait[mask])
    parts["checkpoint"] = np.zeros(shape)
    parts = {name: np.where(wall > 0, part, 0.0) for name, part in parts.items()}
    rest = wall - sum(parts.values())
    message = spans.kind == _MESSAGE
    computed = summed(spans.rank[message], spans.step[message], running[message]) + _between(run, ranks, steps)
    off = np.clip(rest - computed, 0, None)
    parts["descheduled"] += off
    parts["unexplained"] = rest - off
    order = [*COMPUTE, *sorted(name for name in parts if "." in name), *ALWAYS]
    computes = spans.kind <= _OPTIMIZER
    computing = summed(spans.rank[computes], spans.step[computes], own[computes])
    return Budget(ranks, steps, wall, {name: parts[name] for name in order}, computing)


def _walls(run: Run, ranks: list[int], steps: list[int]) -> np.ndarray:
    """Return the duration in ns of every profiled step as its rank measured it."""
    wall = np.zeros((len(ranks), len(steps)))
    for row, column, fact in _facts(run, ranks, steps):
        wall[row, column] = fact["step_s"] * 1e9
    return wall


def _facts(run: Run, ranks: list[int], steps: list[int]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (row, column, step fact) of every profiled step of every rank."""
    columns = {step: i for i, step in enumerate(steps)}
    for row, rank in enumerate(ranks):
        for fact in run.ranks[rank].steps:
            if fact["phase"] == "train" and fact["step"] in columns:
                yield row, columns[fact["step"]], fact


def _between(run: Run, ranks: list[int], steps: list[int]) -> np.ndarray:
    """Return the CPU time in ns between the entries of every profiled step; inf where it is not known."""
    found = np.full((len(ranks), len(steps)), np.inf)
    for row, column, fact in _facts(run, ranks, steps):
        if fact["between_cpu_s"] is not None:
            found[row, column] = fact["between_cpu_s"] * 1e9
    return found


def _inside(calls: Calls, spans: Spans, stood: Blocked) -> tuple[np.ndarray, np.ndarray]:
    """Return, per span, the ns blocked and the CPU time in ns used meanwhile.

    A reduction is issued in one entry and waited for in another: each interval belongs to the span in which it began.
    """
    inside, cpu = np.zeros(len(spans.start)), np.zeros(len(spans.start))
    issuing = np.clip(calls.issued - calls.issue, 0, None)
    standing = stood.total - issuing
    for rank, here in spans.bounds.items():
        of = calls.of(rank)
        size = here.stop - here.start
        if not size:
            continue
        for began, blocked_ns, cpu_ns in (
            (calls.issue[of], issuing[of], np.zeros(of.stop - of.start)),
            (calls.wait[of], standing[of], stood.cpu[of]),
        ):
            at = np.searchsorted(spans.start[here], began, side="right") - 1
            valid = (began >= 0) & (at >= 0) & (began < spans.end[here][np.clip(at, 0, None)])
            inside[here] += np.bincount(at[valid], weights=blocked_ns[valid], minlength=size)
            cpu[here] += np.bincount(at[valid], weights=cpu_ns[valid], minlength=size)
    return inside, cpu
