"""Build one step's dependency graph, replay it with some messages free, and follow its critical path backwards.

A rank is a chain: it computes, posts its part of a collective or message (an *issue*), or waits for one. A collective
is over for a rank some time (its *transfer*) after the last member's issue; the wait for it ends then, or at once if
that is past. The time that the operating system then takes until the rank continues (*woken late*) is kept like
computing; the issuing call, and the local part of an operation that the backend emulates, belong to the transfer. All
durations are the measured ones, so a replay with nothing changed should give the measured step; its error says how far
the other results can be trusted.

    graph = build(run, clocks, calls, meetings, step)
    graph.replay(frozenset({"tp"})).step_s      the step if tp's messages took no time, with the same dependencies
    critical_path(graph)                        parts of the step's duration, from its end backwards

Times are ns on the common timeline; results are seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dist_gpt.events import OPS
from dist_gpt.report.analysis.chains import ANYBODY, ISSUES, Link, make_chains, select
from dist_gpt.schedule.action import Op
from dist_gpt.schedule.expand import FREE, GATHER, RECV, REDUCE, SEND, UPDATE

if TYPE_CHECKING:
    from dist_gpt.report.analysis.clocks import Clocks
    from dist_gpt.report.analysis.match import Calls, Meetings
    from dist_gpt.report.read.load import RankLog, Run

DATA, REST, LATE, BEFORE = "data", "unexplained", "woken late", "previous step"
_SHARED = dict.fromkeys((REDUCE, UPDATE, GATHER, FREE), "optimizer")
_KIND = {**_SHARED, SEND: REST, RECV: REST}  # as in the budget


class ReplayError(ValueError):
    """Error for a step that cannot be replayed: nothing was recorded, or its records contradict each other."""


class Piece(NamedTuple):
    """Interval in which `label` is the innermost span."""

    start: int
    end: int
    label: Any


def flatten(spans: Iterable[tuple[int, int, Any]]) -> list[Piece]:
    """Return nested spans (start, end, label) as disjoint pieces in order, without empty ones.

    Each moment belongs to the span that began last.
    """
    ordered = sorted(spans, key=lambda span: (span[0], -span[1]))
    pieces: list[Piece] = []
    stack: list[tuple[int, Any]] = []  # (end, label), the innermost last
    now = ordered[0][0] if ordered else 0

    def until(moment: int) -> None:
        nonlocal now
        while stack and now < moment:
            end, label = stack[-1]
            if now < min(end, moment):
                pieces.append(Piece(now, min(end, moment), label))
            now = max(now, min(end, moment))
            if end <= moment:
                stack.pop()
        now = max(now, moment)

    for start, end, label in ordered:
        until(start)
        stack.append((end, label))
    until(max((end for end, _ in stack), default=now))
    return pieces


@dataclass(frozen=True)
class Replay:
    """Replayed step: when each rank ended after the first one began, and the whole, in seconds."""

    end_s: dict[int, float]
    step_s: float


@dataclass
class _Course:
    """Course of a replay. Per rank and operation: the time after it, and when its meeting was over for the rank."""

    after: list[list[int]]
    over: list[list[int]]
    last: list[tuple[int, int, int]]  # per meeting: time of the last issue, its rank's position, its place in the chain
    end: list[int]


@dataclass
class Graph:
    """Dependency graph of one step. Lists are by position of a rank, or by meeting, numbered from 0."""

    step: int
    ranks: list[int]
    start: list[int]
    chains: list[list[Link]]
    tail: list[tuple[int, int]]  # (begin, ns) of the computing after the last operation
    need: list[int]  # by meeting: its issues inside the step
    posted: list[int]  # by meeting: its last issue before the step, or a time before all others
    axis: list[str]  # by meeting
    op: list[int]  # by meeting: index into OPS
    kinds: Callable[[int, int, int], dict[str, int]]  # (rank, from, to) -> ns by budget category
    measured_s: float

    @property
    def begin(self) -> int:
        """Time at which the first rank began."""
        return min(self.start)

    def replay(self, free: frozenset[str] = frozenset()) -> Replay:
        """Replay the step as if messages of the axes in `free` took no time. Raises ReplayError on a deadlock."""
        end = self._run(free).end
        seconds = {rank: (t - self.begin) / 1e9 for rank, t in zip(self.ranks, end, strict=True)}
        return Replay(seconds, max(seconds.values()))

    @property
    def replay_error(self) -> float:
        """Error of the unchanged replay, relative to the measured step."""
        return abs(self.replay().step_s - self.measured_s) / self.measured_s if self.measured_s > 0 else 0.0

    def _run(self, free: frozenset[str] = frozenset()) -> _Course:
        course = _Course(
            [[] for _ in self.ranks],
            [[] for _ in self.ranks],
            [(time, -1, -1) for time in self.posted],
            [0] * len(self.ranks),
        )
        missing = list(self.need)
        waiting: dict[int, list[int]] = defaultdict(list)
        awake = deque(range(len(self.ranks)))
        while awake:
            position = awake.popleft()
            blocked = self._advance(position, course, missing, free, awake, waiting)
            if blocked is not None:
                waiting[blocked].append(position)
        if any(waiting.values()):
            raise self._deadlock(course, {m: ranks for m, ranks in waiting.items() if ranks})
        return course

    def _advance(
        self,
        position: int,
        course: _Course,
        missing: list[int],
        free: frozenset[str],
        awake: deque[int],
        waiting: dict[int, list[int]],
    ) -> int | None:
        """Carry out a rank's chain as far as possible; return the meeting that it waits for, None at its end."""
        chain, after, over, last = self.chains[position], course.after[position], course.over[position], course.last
        now = after[-1] if after else self.start[position]
        for place in range(len(after), len(chain)):
            _, before, meeting, transfer, local, late, own = chain[place]
            now += before
            if transfer == ISSUES:
                if now >= last[meeting][0]:
                    last[meeting] = (now, position, place)
                missing[meeting] -= 1
                if not missing[meeting]:
                    awake.extend(waiting.pop(meeting, ()))
                over.append(now)
            else:
                if missing[meeting] and own == ANYBODY:
                    return meeting
                arrival = last[meeting][0] if own == ANYBODY else over[own]
                end = arrival if self.axis[meeting] in free else arrival + transfer
                over.append(end)
                now = max(now, end) + late
            if self.axis[meeting] not in free:
                now += local
            after.append(now)
        course.end[position] = now + self.tail[position][1]
        return None

    def _deadlock(self, course: _Course, waiting: dict[int, list[int]]) -> ReplayError:
        stuck = sorted((self.ranks[p], meeting) for meeting, positions in waiting.items() for p in positions)
        rank, meeting = stuck[0]
        late = [
            self.ranks[p] for p, chain in enumerate(self.chains) if self._issues_later(chain, course.after[p], meeting)
        ]
        others = f", which ranks {late} issue only after waits of their own" if late else ""
        what = f"{self.axis[meeting]} {OPS[self.op[meeting]]}"
        return ReplayError(
            f"step {self.step}: the records contradict each other: rank {rank} waits for its {what}{others}; "
            f"{len(stuck)} of {len(self.ranks)} ranks never finish"
        )

    @staticmethod
    def _issues_later(chain: list[Link], done: list[int], meeting: int) -> bool:
        return any(op.meeting == meeting and op.transfer == ISSUES for op in chain[len(done) :])


def free_axes(graph: Graph) -> list[dict[str, Any]]:
    """Replay the step once per axis, as if its messages took no time; `saving` is relative to the unchanged replay."""
    whole = graph.replay().step_s
    rows = []
    for axis in sorted(set(graph.axis)):
        step_s = graph.replay(frozenset({axis})).step_s
        rows.append({"axis": axis, "step_s": step_s, "saving": (whole - step_s) / whole if whole > 0 else 0.0})
    return rows


def critical_path(graph: Graph) -> list[dict[str, Any]]:
    """Return the parts of the step's duration, from the rank that ended last back along what each moment waited for.

    Seconds by (rank, what), the largest first; they add up to the step. `what` is a kind of computing,
    `transfer.{axis}` (charged to the rank that waited), `woken late`, or `previous step`: the rank began later.
    """
    course = graph._run()
    spent: dict[tuple[int, str], int] = defaultdict(int)
    position = max(range(len(graph.ranks)), key=lambda p: course.end[p])
    begin, length = graph.tail[position]
    place = len(graph.chains[position])
    while True:
        rank, chain = graph.ranks[position], graph.chains[position]
        for kind, ns in graph.kinds(rank, begin, begin + length).items():
            spent[rank, kind] += ns
        place -= 1
        if place < 0:
            spent[rank, BEFORE] += graph.start[position] - graph.begin
            break
        op, over = chain[place], course.over[position][place]
        axis = f"transfer.{graph.axis[op.meeting]}"
        spent[rank, axis] += op.local
        spent[rank, LATE] += op.late
        ready = (course.after[position][place - 1] if place else graph.start[position]) + op.before
        if op.transfer != ISSUES and over > ready:  # the rank waited: continue where the last member issued
            at = course.last[op.meeting][1:] if op.own == ANYBODY else (position, op.own)
            seen = at[0] >= 0
            arrival = course.over[at[0]][at[1]] if seen else max(course.last[op.meeting][0], graph.begin)
            spent[rank, axis] += over - arrival
            if not seen:
                spent[rank, BEFORE] += arrival - graph.begin
                break
            position, place = at
            op = graph.chains[position][place]
        begin, length = op.begin, op.before
    total = sum(spent.values())
    rows = [
        {"rank": rank, "what": what, "s": ns / 1e9, "share": ns / total} for (rank, what), ns in spent.items() if ns > 0
    ]
    return sorted(rows, key=lambda row: (-row["s"], row["rank"], row["what"]))


# --- from records to the graph -----------------------------------------------------------------------------------


def build(run: Run, clocks: Clocks, calls: Calls, meetings: Meetings, step: int) -> Graph:
    """Return the graph of one profiled step, over the ranks that recorded it. Raises ReplayError if none did."""
    windows = {rank: window for rank, log in run.ranks.items() if (window := _window(log, clocks, step)) is not None}
    if not windows:
        raise ReplayError(f"no rank recorded step {step} in its profiling window")
    ranks = sorted(windows)
    start, stop = (np.array([windows[rank][i] for rank in ranks], dtype=np.int64) for i in (0, 1))
    rows = select(calls, meetings, step, np.array(ranks), start, stop)
    chains, tail = make_chains(rows, start, stop)
    outside = ~rows.inside
    posted = np.full(len(rows.axis), min(start.min(), rows.issue.min(initial=start.min())))
    np.maximum.at(posted, rows.meeting[outside], rows.issue[outside])
    return Graph(
        step,
        ranks,
        start.tolist(),
        chains,
        tail,
        np.bincount(rows.meeting[rows.inside], minlength=len(rows.axis)).tolist(),
        posted.tolist(),
        rows.axis,
        rows.ops,
        _kinds(run, clocks, step),
        float(stop.max() - start.min()) / 1e9,
    )


def _window(log: RankLog, clocks: Clocks, step: int) -> tuple[int, int] | None:
    """Return start and end of `step` on a rank; None without spans of it, or if the rank's clock is not usable."""
    if not clocks.usable(log.rank) or not (log.spans[:, 0] == step).any():
        return None
    for fact in log.steps:
        if fact["step"] == step and fact["phase"] == "train" and fact.get("start_ns") is not None:
            start = int(fact["start_ns"])
            both = clocks.to_origin(log.rank, np.array([start, start + round(fact["step_s"] * 1e9)], dtype=np.int64))
            return int(both[0]), int(both[1])
    return None


def kind_of(run: Run, rank: int, index: int) -> str:
    """Return the budget's name for entry `index` of a rank's step list; -1 is reading data."""
    steps = run.plan_of(rank).steps
    if not 0 <= index < len(steps):
        return DATA
    step = steps[index]
    return "recompute" if step.action.op is Op.R else _KIND.get(step.kind, step.kind)


def _kinds(run: Run, clocks: Clocks, step: int) -> Callable[[int, int, int], dict[str, int]]:
    """Return a function (rank, from, to) of what the rank computed in `step` between two moments: ns by kind."""
    made: dict[int, list[Piece]] = {}

    def pieces_of(rank: int) -> list[Piece]:
        if rank not in made:
            spans = run.ranks[rank].spans
            spans = spans[spans[:, 0] == step]
            start = clocks.to_origin(rank, spans[:, 2]).tolist()
            end = clocks.to_origin(rank, spans[:, 2] + spans[:, 3]).tolist()
            kinds = [kind_of(run, rank, index) for index in spans[:, 1].tolist()]
            made[rank] = flatten(zip(start, end, kinds, strict=True))
        return made[rank]

    def between(rank: int, begin: int, end: int) -> dict[str, int]:
        pieces = pieces_of(rank)
        spent: dict[str, int] = defaultdict(int)
        for piece in pieces[max(0, bisect_right(pieces, (begin,)) - 1) :]:
            if piece.start >= end:
                break
            spent[piece.label] += max(0, min(end, piece.end) - max(begin, piece.start))
        spent[REST] += end - begin - sum(spent.values())
        return spent

    return between
