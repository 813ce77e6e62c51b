"""Match calls with each other: the k-th call of a rank on a channel in a step meets the k-th of every other member.

    clocks = align(run)
    calls, meetings = match(run, clocks)         # repairs `clocks` where effects precede their causes
    waited_for = meetings.culprit[calls.meeting]

A call is one rank's part of a meeting. A meeting begins when its last member has issued its call (`arrival`) and ends
with the last member's end. All columns are numpy arrays; times are int64 ns since the origin of `clocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dist_gpt.events import BOUND, CALL_COLUMNS, ESTIMATED, OPS
from dist_gpt.report.analysis.clocks import Clocks, Heard, last_causes, repair
from dist_gpt.report.read.load import Run
from dist_gpt.report.units import count_of

SEND, RECV, BROADCAST = (OPS.index(op) for op in ("send", "recv", "broadcast"))
TOLD_NS = 1_000
"""Least contradiction worth a report, in ns; not used at present."""
Channel = tuple[str, tuple[int, ...], str]
"""(axis, ranks, direction); a pipeline's edge has direction f or b and leads from the first rank to the second."""


@dataclass
class Calls:
    """Calls as columns, one entry per call, sorted by rank, then step, then time of issue."""

    rank: np.ndarray
    step: np.ndarray
    index: np.ndarray  # into the rank's step list, -1 outside
    gid: np.ndarray  # into `channels`
    op: np.ndarray  # into OPS
    payload: np.ndarray
    issue: np.ndarray
    issued: np.ndarray
    done: np.ndarray  # -1 where unknown, as are wait and waited
    wait: np.ndarray
    waited: np.ndarray
    cpu: np.ndarray  # CPU time used while waiting, ns
    flags: np.ndarray
    meeting: np.ndarray  # into Meetings, -1 for a rank whose clock is not usable
    channels: list[Channel] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Positions of the calls that met, sorted by meeting."""
    _bounds: dict[int, slice] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def axis_of(self) -> np.ndarray:
        """Position in `axes` of each channel's axis, by gid."""
        return np.array([self.axes.index(axis) for axis, _, _ in self.channels], dtype=np.int64)

    @property
    def axis(self) -> np.ndarray:
        """Position in `axes` of each call's axis."""
        return self.axis_of[self.gid]

    def of(self, rank: int) -> slice:
        """Return the slice that holds the calls of `rank`."""
        return self._bounds.get(rank, slice(0, 0))


@dataclass
class Meetings:
    """Meetings as columns, one entry per meeting, sorted by step, then channel, then order on the channel."""

    step: np.ndarray
    gid: np.ndarray
    axis: np.ndarray  # into Calls.axes
    op: np.ndarray  # into OPS; a message is a send
    payload: np.ndarray
    size: np.ndarray  # ranks of the channel
    members: np.ndarray  # ranks seen
    arrival: np.ndarray  # last issue
    culprit: np.ndarray  # the rank that issued last
    end: np.ndarray  # never before arrival; -1 where no member knows it
    complete: np.ndarray  # bool: all members seen, all with one op
    exact: np.ndarray  # bool: a member knows the exact end; else `end` is only a bound
    first: np.ndarray
    """Position in Calls.order at which each meeting's calls begin."""

    def __len__(self) -> int:
        return len(self.step)


def match(run: Run, clocks: Clocks) -> tuple[Calls, Meetings]:
    """Return all calls of the window on one clock, and their meetings.

    Shifts `clocks` as `repair` finds, and reports in `run.problems` what stays impossible.
    """
    calls = _calls(run, clocks)
    first = _meet(calls, clocks)
    heard = _heard(calls, first)
    _repair(calls, clocks, heard)
    _clamp(calls, heard, run.problems)
    meetings = _meetings(calls, first)
    if strange := int((meetings.members == meetings.size).sum() - meetings.complete.sum()):
        run.problems.append(f"{count_of(strange, 'collective')} with different operations on its ranks; not counted")
    return calls, meetings


# --- calls ----------------------------------------------------------------------------------------------------------


class _Channels:
    """Numbers (gids) given to the channels of all ranks."""

    def __init__(self, run: Run) -> None:
        self.layout = run.layout
        self.known: dict[Channel, int] = {}
        self._of_rank: dict[tuple[str, int], int] = {}

    def gids(self, run: Run, rank: int) -> np.ndarray:
        """Return the gids of the channels in the header of `rank`."""
        found = []
        for channel in run.ranks[rank].header["channels"]:
            axis, pair = channel["axis"], channel.get("ranks")
            if pair is not None:
                found.append(self._number((axis, tuple(pair), channel.get("direction") or "")))
                continue
            if (axis, rank) not in self._of_rank:  # once per group: the group of a world of 1,024 lists 1,024 ranks
                ranks = self.layout.group(axis, rank)
                self._of_rank |= dict.fromkeys(((axis, member) for member in ranks), self._number((axis, ranks, "")))
            found.append(self._of_rank[axis, rank])
        return np.array(found, dtype=np.int64)

    def _number(self, channel: Channel) -> int:
        return self.known.setdefault(channel, len(self.known))


def _calls(run: Run, clocks: Clocks) -> Calls:
    """Return every rank's calls, in time order within a step, on the common clock; not yet matched."""
    total = sum(len(log.calls) for log in run.ranks.values())
    table = np.empty((len(CALL_COLUMNS) + 1, total), dtype=np.int64)  # one row per column, and the rank
    column = {name: table[i] for i, name in enumerate((*CALL_COLUMNS, "rank"))}
    channels, bounds, at = _Channels(run), {}, 0
    for rank, log in run.ranks.items():
        here = slice(at, at + len(log.calls))
        rows = log.calls.T
        step, issue = rows[CALL_COLUMNS.index("step")], rows[CALL_COLUMNS.index("issue")]
        table[:-1, here] = rows[:, np.lexsort((issue, step))]
        column["rank"][here] = rank
        column["channel"][here] = channels.gids(run, rank)[column["channel"][here]]
        after = {name: column[name][here] for name in ("issued", "done", "wait", "waited")}
        since = column["issue"][here].copy()
        column["issue"][here] = clocks.to_origin(rank, since)
        for stamps in after.values():
            stamps[:] = np.where(stamps >= 0, clocks.to_origin(rank, since + stamps), -1)
        bounds[rank] = here
        at = here.stop
    gid = column.pop("channel")
    listed = list(channels.known)
    axes = sorted({axis for axis, _, _ in listed})
    return Calls(**column, gid=gid, meeting=np.full(total, -1), channels=listed, axes=axes, _bounds=bounds)


def _meet(calls: Calls, clocks: Clocks) -> np.ndarray:
    """Fill in `calls.meeting` and `calls.order`; return the positions in the order at which meetings begin."""
    rows = np.flatnonzero(np.isin(calls.rank, [rank for rank in clocks.ranks if clocks.usable(rank)]))
    rows = rows[np.lexsort((calls.gid[rows], calls.step[rows], calls.rank[rows]))]  # stable: by time within
    count = _positions(_changes(calls.rank[rows], calls.step[rows], calls.gid[rows]))
    by_meeting = np.lexsort((count, calls.gid[rows], calls.step[rows]))  # stable: by rank within
    rows, count = rows[by_meeting], count[by_meeting]
    begins = _changes(calls.step[rows], calls.gid[rows], count)
    calls.meeting[rows] = np.cumsum(begins) - 1
    calls.order = rows
    return np.flatnonzero(begins)


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Return where any column differs from the entry before it (bool); the first entry always does."""
    changed = np.ones(len(columns[0]), dtype=bool)
    if len(changed):
        changed[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return changed


def _positions(begins: np.ndarray) -> np.ndarray:
    """Return each entry's count since the last beginning: 0, 1, 2, ..."""
    place = np.arange(len(begins))
    return place - np.maximum.accumulate(np.where(begins, place, 0))


# --- causes and effects ---------------------------------------------------------------------------------------------


def _heard(calls: Calls, first: np.ndarray) -> Heard:
    """Return the causes and effects that clocks must respect, as `repair` takes them.

    A message is received after it was sent; any other operation is complete on no member before all have issued it.
    Broadcasts are left out, since their root is not recorded.
    """
    rows = calls.order
    op, done = calls.op[rows], calls.done[rows]
    exact = (done >= 0) & (calls.flags[rows] & ESTIMATED == 0)  # an estimate moves no clock
    complete = np.where(exact, done, calls.waited[rows])
    known = op != BROADCAST
    ranks = np.array(sorted(calls._bounds), dtype=np.int64)
    return Heard(
        first, calls.meeting[rows], np.searchsorted(ranks, calls.rank[rows]), calls.issue[rows], complete,
        known & (op != RECV), known & (op != SEND) & (complete >= 0),
    )  # fmt: skip


def _repair(calls: Calls, clocks: Clocks, heard: Heard) -> None:
    """Shift clocks as `repair` finds, and with them all times of their calls."""
    ranks = sorted(calls._bounds)
    shifts = repair(heard, np.array([clocks.ranks[rank].error_ns for rank in ranks], dtype=np.int64))
    for rank, shift in zip(ranks, shifts.tolist(), strict=True):
        if shift:
            clocks.ranks[rank].shift += shift
            here = calls.of(rank)
            calls.issue[here] += shift
            for stamps in (calls.issued[here], calls.done[here], calls.wait[here], calls.waited[here]):
                stamps[stamps >= 0] += shift


def _clamp(calls: Calls, heard: Heard, problems: list[str]) -> None:
    """Move ends that precede the last arrival, beyond what the clocks' errors explain, to that arrival."""
    rows = calls.order
    issue = calls.issue[rows]
    cause = last_causes(heard, issue)[heard.meeting]
    arrival = np.where(cause >= 0, issue[cause], np.iinfo(np.int64).min)
    seen = calls.done[rows]
    early = heard.effect & (seen >= 0) & (seen < arrival)
    stated = early & (calls.flags[rows] & ESTIMATED == 0)
    if stated.any():
        most = int((arrival - seen)[stated].max()) / 1000
        problems.append(
            f"{count_of(int(stated.sum()), 'call')} ended up to {most:.1f} us before the last member arrived, more "
            "than the errors of the clocks explain; the arrival is taken as the end"
        )
    calls.done[rows[early]] = arrival[early]  # not `waited`: how long a rank was blocked needs only its own clock


# --- meetings -------------------------------------------------------------------------------------------------------


def _meetings(calls: Calls, first: np.ndarray) -> Meetings:
    rows = calls.order
    op, rank, issue = calls.op[rows], calls.rank[rows], calls.issue[rows]
    sizes = np.array([len(ranks) for _, ranks, _ in calls.channels], dtype=np.int64)
    gid, meeting = calls.gid[rows[first]], calls.meeting[rows]
    arrival = _most(issue, first)
    last = np.empty(len(first), dtype=np.int64)
    latest = np.flatnonzero(issue == arrival[meeting])[::-1]
    last[meeting[latest]] = latest  # of several, the lowest rank
    kind = np.where(op == RECV, SEND, op)  # a message is one operation
    one_op = _most(kind, first) == -_most(-kind, first)
    members = np.diff(np.append(first, len(rows)))
    end, exact = _ends(calls, first, arrival)
    return Meetings(
        step=calls.step[rows[first]], gid=gid, axis=calls.axis_of[gid], op=kind[first],
        payload=_most(calls.payload[rows], first), size=sizes[gid], members=members, arrival=arrival,
        culprit=rank[last], end=end, complete=(members == sizes[gid]) & one_op, exact=exact, first=first,
    )  # fmt: skip


def _ends(calls: Calls, first: np.ndarray, arrival: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the last end that a member of each meeting knows, and whether any knows it exactly.

    A message's end is the sender's, since a receiver often knows only a bound.
    """
    rows = calls.order
    done, op = calls.done[rows], calls.op[rows]
    exact = (done >= 0) & (calls.flags[rows] & BOUND == 0)
    known = _most(np.where(exact, done, -1), first)  # a member that came back late knows only a bound
    end = np.where(known >= 0, known, _most(np.where(done >= 0, done, calls.waited[rows]), first))
    sent = _most(np.where((op == SEND) & exact, done, -1), first)
    end = np.where(sent >= 0, sent, end)
    return np.where(end >= 0, np.maximum(end, arrival), -1), known >= 0


def _most(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the largest value of each meeting."""
    return np.maximum.reduceat(values, first) if len(first) else values[:0]
