"""One training step of all ranks on a simulated clock: what `synthetic` writes down.

Every rank goes through its own step list: compute takes what `Times` says, a collective ends a transfer after its last
member came, messages and gradient reductions go on under what follows them. All ranks begin the step together.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_gpt.config.schema import Config
from dist_gpt.events import BOUND, EMULATED, OPS
from dist_gpt.plan.count import count_comm, count_memory
from dist_gpt.plan.steps import RankPlan, layout_of, p2p_direction
from dist_gpt.schedule.action import Action, Op
from dist_gpt.schedule.expand import (
    BACKWARD,
    FORWARD,
    GATHER,
    RECOMPUTE,
    RECV,
    REDUCE,
    SEND,
    UPDATE,
    WEIGHT,
    Step,
)  # fmt: skip

COLLECTIVE_AXES = ("world", "data", "embed", "tp")


@dataclass(frozen=True)
class Late:
    """`ns` more in the first entry of `kind` in a step, on one rank: asleep, or computing more within the
    entry, between its collectives."""

    rank: int
    ns: int
    kind: str = FORWARD
    steps: frozenset[int] | None = None  # None: all
    asleep: bool = True


@dataclass(frozen=True)
class Times:
    """What things take, in ns: actions of a whole chunk, and transfers. `slow`: pipeline stage -> factor."""

    forward: int = 400_000
    backward: int = 800_000
    weight: int = 300_000
    update: int = 200_000
    data: int = 20_000
    latency: int = 20_000
    ns_per_byte: float = 0.5
    issue: int = 3_000
    slow: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    """Every compute time is drawn anew, by up to this share more."""


class Ranks:
    """Plans and channels of all ranks of `config`; ranks that do the same share their plan."""

    def __init__(self, config: Config, times: Times) -> None:
        self.config, self.times, self.world, self.layout = config, times, config.world_size, layout_of(config)
        self._plans: dict[tuple[int, int], RankPlan] = {}
        self._declared: dict[tuple[int, int], Any] = {}
        self._channels: dict[int, list[dict[str, Any]]] = {}
        self._facts: dict[tuple[int, int], tuple[str, dict[str, int]]] = {}
        self._names: dict[int, list[tuple[Any, int]]] = {}

    def facts(self, rank: int) -> tuple[str, dict[str, int]]:
        """(what a step communicates, as JSON; memory by part), of the ranks like this one."""
        plan = self.plan(rank)
        key = (plan.coords.pp, plan.coords.tp)
        if key not in self._facts:
            comm = json.dumps(count_comm(plan, plan.steps).as_dict(), separators=(",", ":"))
            self._facts[key] = comm, count_memory(plan, plan.steps)
        return self._facts[key]

    def plan(self, rank: int) -> RankPlan:
        """Of the first rank with this one's place in pipeline and tensor group."""
        at = self.layout.coords(rank)
        if (at.pp, at.tp) not in self._plans:
            self._plans[at.pp, at.tp] = RankPlan(self.config, self.layout.rank(at.pp, 0, 0, at.tp))
        return self._plans[at.pp, at.tp]

    def declared(self, rank: int) -> Any:
        """The collectives of every entry of the step list."""
        plan = self.plan(rank)
        key = (plan.coords.pp, plan.coords.tp)
        if key not in self._declared:
            self._declared[key] = [plan.declare(step).comm for step in plan.steps]
        return self._declared[key]

    def channels(self, rank: int) -> list[dict[str, Any]]:
        """As the header lists them: axes with more than one rank, then the directed edges."""
        if rank not in self._channels:
            here = self.layout.coords(rank)
            listed: list[dict[str, Any]] = [
                {"axis": axis} for axis in COLLECTIVE_AXES if len(self.layout.group(axis, rank)) > 1
            ]
            holders, edges = self.plan(rank).holders, set()
            for a, b in zip(holders, holders[1:], strict=False):
                edges |= {(a, b, "f"), (b, a, "b")} if a != b and here.pp in (a, b) else set()
            for a, b, direction in sorted(edges):
                pair = [self.layout.rank(p, here.dp, here.cp, here.tp) for p in (a, b)]
                listed.append({"axis": "pp", "ranks": pair, "direction": direction})
            self._channels[rank] = listed
        return self._channels[rank]

    def names(self, rank: int) -> list[tuple[Any, int]]:
        """(what all members call it, members) of each channel: the axis and its first rank."""
        if rank not in self._names:
            found = []
            for channel in self.channels(rank):
                ranks = tuple(channel.get("ranks") or self.layout.group(channel["axis"], rank))
                named = ranks if "ranks" in channel else ranks[0]
                found.append(((channel["axis"], named, channel.get("direction")), len(ranks)))
            self._names[rank] = found
        return self._names[rank]

    def channel(self, rank: int, plan: RankPlan, step: Step, axis: str) -> int:
        """Which channel a call of `step` along `axis` goes over."""
        channels = self.channels(rank)
        if axis != "pp":
            return channels.index({"axis": axis})
        there, here = plan.holders[step.action.partner_chunk], plan.coords.pp
        ends = (here, there) if step.kind == SEND else (there, here)
        at = self.layout.coords(rank)
        pair = [self.layout.rank(p, at.dp, at.cp, at.tp) for p in ends]
        return channels.index({"axis": "pp", "ranks": pair, "direction": p2p_direction(step.action.op)})


# --- the simulation -------------------------------------------------------------------------------------------------


@dataclass
class _Meeting:
    """A collective or message under way; `end` is known when all are there."""

    missing: int
    took: int = 0
    arrival: int = 0
    end: int | None = None
    waiting: list[Iterator[_Meeting]] = field(default_factory=list)


@dataclass
class _Call:
    """One rank's part of a meeting. Times since the step's start."""

    meeting: _Meeting
    index: int
    channel: int
    op: str
    payload: int
    issue: int
    wait: int = 0
    waited: int = 0

    def row(self, took: int) -> list[int]:
        """As the file has it, without the step."""
        flags = EMULATED if self.op == "reduce_scatter" else BOUND if self.op == "recv" else 0
        wait, waited = self.wait - self.issue, self.waited - self.issue
        done = waited if flags & BOUND else int(self.meeting.end or 0) - self.issue
        op = OPS.index(self.op)
        return [self.index, self.channel, op, self.payload, self.issue, took, done, wait, waited, 0, flags]


class Simulation:
    """One step of all ranks; `ends` is when each one is through, in ns since its start."""

    def __init__(self, ranks: Ranks, late: Sequence[Late], seed: int) -> None:
        self.ranks, self.times = ranks, ranks.times
        self.random = np.random.default_rng(seed)
        self._late = {(one.rank, one.kind): one for one in late}
        self._now = [0] * ranks.world
        self._idle = [0] * ranks.world  # ns without CPU since the entry began
        self._calls: list[list[_Call]] = [[] for _ in range(ranks.world)]
        self._spans: list[list[list[int]]] = [[] for _ in range(ranks.world)]
        self._counts: dict[tuple[int, int], int] = {}
        self._meetings: dict[tuple[Any, int], _Meeting] = {}
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._ready = deque(self._program(rank) for rank in range(ranks.world))
        while self._ready:
            program = self._ready.popleft()
            for meeting in program:  # as far as it gets
                if meeting.end is None:
                    meeting.waiting.append(program)
                    break
        assert all(m.end is not None for m in self._meetings.values()), "a call has no partner"
        self.ends = self._now

    def rows(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """(calls, spans) as in the file, but without the step; int64."""
        if rank not in self._rows:
            calls = np.array([call.row(self.times.issue) for call in self._calls[rank]], dtype=np.int64)
            self._rows[rank] = calls.reshape(-1, 11), np.array(self._spans[rank], dtype=np.int64)
        return self._rows[rank]

    def _program(self, rank: int) -> Iterator[_Meeting]:
        """A rank's way through its list; yields what it waits for."""
        plan, declared = self.ranks.plan(rank), self.ranks.declared(rank)
        received: dict[Action | None, _Call] = {}
        reductions: list[_Call] = []
        sends: list[_Call] = []
        gathers: dict[int | None, _Call] = {}  # by bucket
        read: set[int] = set()
        for index, step in enumerate(plan.steps):
            if step.kind == FORWARD and step.action.micro_batch not in read:
                read.add(step.action.micro_batch)
                self._entry(rank, -1, self._now[rank], self.times.data)
            start, self._idle[rank] = self._now[rank], 0
            work = self._work(rank, plan, step)
            if message := received.pop(_input(step), None):
                yield from self._wait(rank, message)
            if step.block is not None:
                for bucket in plan.buckets:
                    if step.block in bucket.blocks and bucket.index in gathers:
                        yield from self._wait(rank, gathers.pop(bucket.index))
            if step.kind == UPDATE or (step.kind == REDUCE and plan.stage >= 2):
                while reductions:
                    yield from self._wait(rank, reductions.pop(0))
            comm = [c for c in declared[index] for _ in range(c.calls)]
            piece = work // (len(comm) + 1)
            later: list[_Call] = []
            for c in comm:
                self._now[rank] += piece
                call = self._issue(rank, index, self.ranks.channel(rank, plan, step, c.axis), c.op, c.payload)
                if step.kind in (SEND, RECV) or c.axis == "data":
                    later.append(call)
                else:
                    yield from self._wait(rank, call)
            if step.kind == UPDATE:
                for call in later:
                    yield from self._wait(rank, call)
            elif step.kind == RECV:
                received[step.action] = later[0]
            elif step.kind == GATHER:
                gathers[step.bucket] = later[0]
            else:
                (sends if step.kind == SEND else reductions).extend(later)
            self._entry(rank, index, start, work - len(comm) * piece)
        for call in sends:
            yield from self._wait(rank, call)

    def _entry(self, rank: int, index: int, start: int, work: int) -> None:
        """The span of an entry that ends with `work` ns of computing."""
        self._now[rank] += work
        wall = self._now[rank] - start
        self._spans[rank].append([index, start, wall, wall - self._idle[rank] if index >= 0 else wall])

    def _work(self, rank: int, plan: RankPlan, step: Step) -> int:
        """Ns of computing of an entry; where it is late by sleeping, that is done first."""
        late = self._late.pop((rank, step.kind), None)
        if late is not None and late.asleep:
            self._now[rank] += late.ns
            self._idle[rank] += late.ns
        more = late.ns if late is not None and not late.asleep else 0
        t = self.times
        whole = {FORWARD: t.forward, BACKWARD: t.backward, WEIGHT: t.weight, RECOMPUTE: t.forward}.get(step.kind)
        if whole is None:
            return (self.times.update if step.kind == UPDATE else 0) + more
        factor = self.times.slow.get(plan.coords.pp, 1.0)
        if self.times.jitter:
            factor *= 1 + self.times.jitter * float(self.random.random())
        return round(whole * factor / len(dict(plan.chunks)[step.action.chunk])) + more

    def _issue(self, rank: int, index: int, channel: int, op: str, payload: int) -> _Call:
        name, size = self.ranks.names(rank)[channel]
        nth = self._counts[rank, channel] = self._counts.get((rank, channel), -1) + 1
        meeting = self._meetings.setdefault((name, nth), _Meeting(size))
        call = _Call(meeting, index, channel, op, payload, self._now[rank])
        self._calls[rank].append(call)
        meeting.missing -= 1
        meeting.took = max(meeting.took, self.times.latency + round(payload * self.times.ns_per_byte))
        meeting.arrival = max(meeting.arrival, call.issue)
        if meeting.missing == 0:
            meeting.end = meeting.arrival + meeting.took
            self._ready.extend(meeting.waiting)
        self._now[rank] += self.times.issue
        self._idle[rank] += self.times.issue
        return call

    def _wait(self, rank: int, call: _Call) -> Iterator[_Meeting]:
        """Until a call's end; waking up takes a moment."""
        call.wait = self._now[rank]
        yield call.meeting
        assert call.meeting.end is not None
        call.waited = max(call.wait + 1_000, call.meeting.end + 2_000)
        self._now[rank] = call.waited
        self._idle[rank] += call.waited - call.wait


def _input(step: Step) -> Action | None:
    """The message that an entry reads, if it comes from elsewhere."""
    op = {FORWARD: Op.RECV_F, BACKWARD: Op.RECV_B}.get(step.kind)
    return None if op is None else Action(step.action.chunk, op, step.action.micro_batch)
