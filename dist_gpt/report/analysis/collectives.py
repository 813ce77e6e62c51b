"""Collectives by axis, operation and size; traffic between ranks; and overlap of communication with computing.

Time is from the last arrival to the last end. Bandwidths follow nccl-tests (doc/PERFORMANCE.md) except for broadcast,
to which it gives 1: algbw is payload over time, busbw is algbw times 2(n-1)/n for all-reduce, (n-1)/n for all-gather,
reduce-scatter, all-to-all and broadcast, 1 for a message, with the group's own n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_gpt.events import DIRECT, EMULATED, OPS, wire_bytes
from dist_gpt.report.analysis.match import Calls, Meetings
from dist_gpt.report.analysis.time_breakdown import Blocked, Spans
from dist_gpt.report.read.load import Run
from dist_gpt.schedule.expand import BACKWARD, FORWARD, GATHER, RECOMPUTE, REDUCE, WEIGHT, Step

MOST_RANKS = 64
"""Most rows of the traffic matrix; more ranks are merged into blocks of neighbours."""
SEND, RECV = OPS.index("send"), OPS.index("recv")
COMPUTE = (FORWARD, RECOMPUTE, BACKWARD, WEIGHT)


@dataclass
class Parts:
    """Calls of complete meetings, with the meeting's operation and payload: both ends of a message count as sends."""

    rows: np.ndarray  # into Calls
    op: np.ndarray
    payload: np.ndarray
    axis: np.ndarray
    size: np.ndarray
    counts: np.ndarray  # bool: False for the receiving end of a message
    ranks: np.ndarray  # number of ranks that use the axis
    steps: int

    def per_step(self, mask: np.ndarray, values: np.ndarray) -> float:
        """Return the sum of `values` (one per part) where `mask`, which selects one axis, per step and rank of it."""
        return float(values[mask].sum()) / max(1, self.steps * int(self.ranks[mask][0])) if mask.any() else 0.0


def parts_of(calls: Calls, meetings: Meetings, steps: int) -> Parts:
    """Return the calls of all complete meetings in a window of `steps` steps."""
    rows = np.flatnonzero(calls.meeting >= 0)
    rows = rows[meetings.complete[calls.meeting[rows]]]
    meeting = calls.meeting[rows]
    axis = calls.axis[rows]
    users = np.array([len(np.unique(calls.rank[rows][axis == a])) for a in range(len(calls.axes))], dtype=np.int64)
    return Parts(
        rows, meetings.op[meeting], meetings.payload[meeting], axis, meetings.size[meeting], calls.op[rows] != RECV,
        users[axis] if len(users) else axis, steps,
    )  # fmt: skip


def bus_factor(op: str, size: int) -> float:
    """Return the ratio of busbw to algbw for `op` in a group of `size` ranks."""
    if op == "all_reduce":
        return 2 * (size - 1) / size
    return 1.0 if op in ("send", "recv", "barrier") else (size - 1) / size


def table(calls: Calls, meetings: Meetings, stood: Blocked, parts: Parts) -> list[dict[str, Any]]:
    """Return a row per (axis, op, payload, group size); counts and seconds are per step, mean over the axis' ranks."""
    keys = np.stack([parts.axis, parts.op, parts.payload, parts.size])
    unique, inverse = np.unique(keys, axis=1, return_inverse=True) if parts.rows.size else (keys, keys[0])
    inverse = inverse.reshape(-1)
    took = (meetings.end - meetings.arrival)[calls.meeting[parts.rows]] / 1e9
    ended, exact = meetings.end[calls.meeting[parts.rows]] >= 0, meetings.exact[calls.meeting[parts.rows]]
    found = []
    for number, (axis, op, payload, size) in enumerate(unique.T.tolist()):
        mask = inverse == number
        rows = parts.rows[mask]
        seconds = took[mask & exact] if (mask & exact).any() else took[mask & ended]
        p50, p95 = (float(np.percentile(seconds, q)) for q in (50, 95)) if len(seconds) else (0.0, 0.0)
        count = parts.per_step(mask, parts.counts.astype(float))
        algbw = payload / p50 if p50 else 0.0
        found.append(
            {
                "axis": calls.axes[axis],
                "op": OPS[op],
                "payload_bytes": payload,
                "ranks": size,
                "calls": count,
                "bytes_per_step": count * payload,
                "time_s_p50": p50,
                "time_s_p95": p95,
                "algbw_bytes_per_s": algbw,
                "busbw_bytes_per_s": algbw * bus_factor(OPS[op], size),
                "exposed_s": float(stood.transfer[rows].sum()) / 1e9 / max(1, parts.steps * int(parts.ranks[mask][0])),
                "wait_s": float(stood.wait[rows].sum()) / 1e9 / max(1, parts.steps * int(parts.ranks[mask][0])),
                "emulated": bool((calls.flags[rows] & EMULATED).any()),
            }
        )
    return sorted(found, key=lambda row: -(row["exposed_s"] + row["wait_s"]))


def sizes(calls: Calls, parts: Parts) -> list[dict[str, Any]]:
    """Return a histogram of payload bytes by axis, in powers of two; calls per step, mean over the axis' ranks."""
    found = []
    for number, axis in enumerate(calls.axes):
        mask = (parts.axis == number) & parts.counts & (parts.payload > 0)
        if not mask.any():
            continue
        exponents = np.floor(np.log2(parts.payload[mask])).astype(int)
        share = 1 / max(1, parts.steps * int(parts.ranks[mask][0]))
        bins = [
            {"low": 2**e, "high": 2 ** (e + 1), "calls": share * int((exponents == e).sum())}
            for e in sorted(set(exponents.tolist()))
        ]
        found.append({"axis": axis, "bins": bins})
    return found


def traffic(calls: Calls, parts: Parts, ranks: list[int]) -> dict[str, Any]:
    """Return wire bytes per step from rank (row) to rank (column): along the ring, or to all for an all-to-all."""
    block = -(-len(ranks) // MOST_RANKS)
    place = {rank: i // block for i, rank in enumerate(ranks)}
    count = -(-len(ranks) // block)
    matrix = np.zeros((count, count))
    mask = parts.counts
    rows = parts.rows[mask]
    to_all = (calls.flags[rows] & (EMULATED | DIRECT)) > 0
    keys = np.stack([calls.gid[rows], parts.op[mask], parts.payload[mask], to_all])
    unique, counts = np.unique(keys, axis=1, return_counts=True) if rows.size else (keys, np.empty(0, int))
    for (gid, op, payload, all_to_all), total in zip(unique.T.tolist(), counts.tolist(), strict=True):
        members = [place[r] for r in calls.channels[gid][1] if r in place]
        if len(members) < 2:
            continue
        if OPS[op] == "send":
            matrix[members[0], members[1]] += total * payload
            continue
        each = total / len(members) * wire_bytes(OPS[op], payload, len(members))
        if all_to_all or OPS[op] == "all_to_all":
            for source in members:
                for destination in members:
                    matrix[source, destination] += each / (len(members) - 1)
            for source in members:
                matrix[source, source] -= each / (len(members) - 1)
        else:
            for source, destination in zip(members, members[1:] + members[:1], strict=True):
                matrix[source, destination] += each
    return {"ranks": ranks[::block], "wire_bytes": (matrix / max(1, parts.steps)).tolist(), "grouped": block > 1}


def overlap(run: Run, calls: Calls, meetings: Meetings, stood: Blocked, parts: Parts, spans: Spans) -> dict[str, Any]:
    """Return the seconds in flight and those exposed, by axis and by bucket, per step.

    Calls for which only a bound of the end is known count like the others of their axis.
    """
    done = np.where(calls.done >= 0, calls.done, calls.waited)[parts.rows]
    under_way = np.clip(done - meetings.arrival[calls.meeting[parts.rows]], 0, None)
    exposed = np.minimum(stood.transfer[parts.rows], under_way)
    axes = []
    for number, axis in enumerate(calls.axes):
        mask = parts.axis == number
        known = mask & meetings.exact[calls.meeting[parts.rows]]
        scale = mask.sum() / known.sum() if known.any() else 1.0
        shown = parts.per_step(mask, exposed) / 1e9
        busy = max(shown, scale * parts.per_step(known if known.any() else mask, under_way) / 1e9)
        axes.append(
            {"axis": axis, "busy_s": busy, "exposed_s": shown, "overlapped": 1 - shown / busy if busy else None}
        )
    return {"axes": axes, "buckets": _buckets(run, calls, parts, spans, under_way, exposed)}


def _buckets(
    run: Run, calls: Calls, parts: Parts, spans: Spans, under_way: np.ndarray, exposed: np.ndarray
) -> list[dict[str, Any]]:
    """Return the time of each bucket of each stage in a step, at dp, cp, tp 0.

    Rows are the reduction of its gradients and, with sharded state, the gathers of its parameters.
    """
    numbers = [calls.axes.index(axis) for axis in ("data", "shard") if axis in calls.axes]
    found = []
    for stage in range(run.layout.pp if numbers else 0):
        rank = run.layout.rank(stage, 0, 0, 0)
        if rank not in run.ranks:
            continue
        entries = run.plan_of(rank).steps
        of = (calls.rank[parts.rows] == rank) & np.isin(parts.axis, numbers)
        index = calls.index[parts.rows]
        for kind, bucket in dict.fromkeys((e.kind, e.bucket) for e in entries if e.kind in (REDUCE, GATHER)):
            places = [i for i, e in enumerate(entries) if (e.kind, e.bucket) == (kind, bucket)]
            mask = of & np.isin(index, places)
            if mask.any():
                found.append(
                    {
                        "stage": stage,
                        "bucket": bucket,
                        "op": kind,
                        "calls": len(places),
                        "bytes": int(parts.payload[mask][0]),
                        "busy_s": len(places) * float(under_way[mask].mean()) / 1e9,
                        "exposed_s": len(places) * float(exposed[mask].mean()) / 1e9,
                        "under": _computed_meanwhile(entries, places[0]),
                    }
                )
    return found


def _computed_meanwhile(entries: Sequence[Step], place: int) -> str:
    """Return the kind of computing after entry `place`, which starts a bucket's collective, or "nothing"."""
    later = [entry.kind for entry in entries[place + 1 :] if entry.kind in COMPUTE]
    if entries[place].kind == REDUCE:  # the update waits for it
        return BACKWARD if later else "nothing"
    return later[0] if later else "nothing"
