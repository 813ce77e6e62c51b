"""Chains of the calls of one step: per rank, its issues and waits in order, and the computing between them.

All times are int64 ns on the common time line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dist_gpt.events import BOUND, EMULATED, OPS

if TYPE_CHECKING:
    from dist_gpt.report.analysis.match import Calls, Meetings

ISSUES, ANYBODY = -1, -1
UNKNOWN = -1  # a timestamp that was not taken
_SEND = OPS.index("send")


class Link(NamedTuple):
    """One operation of a chain: an issue (`transfer` -1) or a wait.

    The `before` ns of computing in front of it began at `begin`, as measured. The meeting is over for the rank
    `transfer` ns after its last issue; then follow `local` ns in which the rank itself works for it (the issuing call,
    the sum of an emulated reduction), and `late` ns until the rank resumed. `own`, if not -1: the wait needs no other
    member, only this rank's issue, at that position of its chain.
    """

    begin: int
    before: int
    meeting: int
    transfer: int
    local: int
    late: int
    own: int


@dataclass
class Rows:
    """Calls that touch a step, one entry each; `axis` and `ops` have one entry per meeting."""

    position: np.ndarray  # of the rank
    meeting: np.ndarray  # numbered from 0 within the step
    op: np.ndarray
    issue: np.ndarray
    issued: np.ndarray
    wait: np.ndarray
    waited: np.ndarray
    cpu: np.ndarray  # ns that this rank needs for an emulated operation after its end
    over: np.ndarray  # when the meeting was over for this rank
    inside: np.ndarray  # issued within the step
    waits: np.ndarray  # waited for within the step
    axis: list[str]
    ops: list[int]


def select(calls: Calls, meetings: Meetings, step: int, ranks: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Rows:
    """Return the step's own calls, and those of the step before it that are waited for only in this one."""
    near = np.flatnonzero(((calls.step == step) | (calls.step == step - 1)) & np.isin(calls.rank, ranks))
    position = np.searchsorted(ranks, calls.rank[near])
    issue, wait, begin, end = calls.issue[near], calls.wait[near], start[position], stop[position]
    known = (calls.waited[near] >= wait) & (calls.wait[near] != UNKNOWN)
    inside, waits = (issue >= begin) & (issue < end), known & (wait >= begin) & (wait < end)
    waits &= inside | (issue < begin)
    used = inside | waits
    near, position, inside, waits = near[used], position[used], inside[used], waits[used]

    # Meetings are renumbered from 0; a call without one is a meeting by itself.
    meeting = calls.meeting[near]
    met = meeting >= 0
    _, first, meeting = np.unique(
        np.where(met, meeting, len(meetings.step) + np.arange(len(near))), return_index=True, return_inverse=True
    )
    done, end = calls.done[near], np.where(met, meetings.end[calls.meeting[near]], calls.waited[near])
    over = np.where((done != UNKNOWN) & (calls.flags[near] & BOUND == 0), done, end)
    return Rows(
        position, meeting, calls.op[near], calls.issue[near], calls.issued[near], calls.wait[near], calls.waited[near],
        np.where(calls.flags[near] & EMULATED, calls.cpu[near], 0), over, inside, waits,
        [calls.axes[i] for i in calls.axis[near[first]].tolist()], calls.op[near[first]].tolist(),
    )  # fmt: skip


def make_chains(rows: Rows, start: np.ndarray, stop: np.ndarray) -> tuple[list[list[Link]], list[tuple[int, int]]]:
    """Return every rank's issues and waits in order, and the (begin, ns) of its computing after the last of them."""
    row = np.concatenate([np.flatnonzero(rows.inside), np.flatnonzero(rows.waits)])
    waits = np.arange(len(row)) >= np.count_nonzero(rows.inside)
    time = np.where(waits, rows.wait[row], rows.issue[row])
    order = np.lexsort((waits, time, rows.position[row]))
    row, waits, time = row[order], waits[order], time[order]
    at, meeting = rows.position[row], rows.meeting[row]
    first = np.searchsorted(at, np.arange(len(start) + 1))
    place = np.arange(len(row)) - first[at]

    # A chain's time before each operation: a rank does one thing at a time, even where damaged rows overlap.
    until = np.maximum(np.where(waits, rows.waited[row], rows.issued[row]), time)
    reached = _running_maximum(until, at)
    begin = start[at].copy()
    begin[1:] = np.where(at[1:] == at[:-1], np.maximum(begin[1:], reached[:-1]), begin[1:])
    now = np.maximum(time, begin)
    until = np.maximum(until, now)

    arrival = np.full(len(rows.axis), np.iinfo(np.int64).min)
    np.maximum.at(arrival, rows.meeting, rows.issue)
    issued = np.full(len(rows.op), -1)
    issued[row[~waits]] = place[~waits]
    over, since = np.minimum(rows.over[row], until), arrival[meeting]
    # A send that was over before its receiver was ready: the backend had buffered it.
    alone = waits & (rows.op[row] == _SEND) & (over < since) & (issued[row] >= 0) & (issued[row] < place)
    since = np.where(alone, rows.issue[row], since)
    transfer = np.where(waits, np.maximum(over - since, 0), ISSUES)
    rest = np.maximum(until - np.where(waits, np.maximum(now, since + transfer), now), 0)
    local = np.where(waits, np.minimum(rest, rows.cpu[row]), rest)
    own = np.where(alone, issued[row], ANYBODY)
    columns = (begin, np.maximum(time - begin, 0), meeting, transfer, local, rest - local, own)
    ops = list(map(Link._make, zip(*(column.tolist() for column in columns), strict=True)))
    chains = [ops[a:b] for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)]
    ends = start.copy()
    np.maximum.at(ends, at, until)
    return chains, list(zip(ends.tolist(), np.maximum(stop - ends, 0).tolist(), strict=True))


def _running_maximum(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the running maximum within each group; groups are contiguous and in ascending order."""
    if not len(values):
        return values
    shift = group * (int(values.max()) - int(values.min()) + 1)
    result: np.ndarray = np.maximum.accumulate(values + shift) - shift
    return result
