"""Why a job died or hangs: which rank, link or collective it came from, told from what the ranks last said.

`explain(states, now, name)` is pure: states in (from launch.watch), a sentence for people out. Times are in seconds of
the launcher's own clock, in which the job's suspensions are left out (dist_gpt.awake).

A rank whose connection closed without a word died. A rank that does not beat and whose kernel still acknowledges is
stopped; a whole host that acknowledges nothing is a link. Errors inside a collective are consequences: the waiting
graph, who waits for whom in which call of which group, leads to the rank that is behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from launch.waiting import Waiting, describe_call

QUIET_S = 4.0
"""Eight beats missed: enough to suspect a rank once others have failed, also on an overloaded machine."""
TOGETHER_S = 0.2
"""Connections that close within this died together."""
SHOWN = 8
ERROR_LINES = 10
Name = Callable[[int], str]


@dataclass(frozen=True)
class RankState:
    """State of one rank, as the watch knows it; times in seconds of the launcher's AwakeClock."""

    rank: int
    hello: Mapping[str, Any] | None = None
    """Its first line; None as long as it has not come."""
    rivals: tuple[Mapping[str, Any], ...] = ()
    """Hellos of other processes that say they are this rank too."""
    joined: float | None = None
    heard: float | None = None
    position: Mapping[str, Any] | None = None
    """POSITION of the last beat, or of its failure; None before the first beat."""
    then: Mapping[str, Any] | None = None
    """Its position when the first rank of the job failed: what it does later is a consequence."""
    moved: float | None = None
    """When its position last changed."""
    channels: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    """Its groups (axis, ranks, direction), in the order of POSITION's counts."""
    failed: Mapping[str, Any] | None = None
    """{"error", "inside", "position"}, and "code", the exit code it leaves with, where that is known"""
    failed_at: float | None = None
    bye: int | None = None
    """The exit code that it announced."""
    closed: float | None = None
    dismissed: bool = False
    """It was told to leave before it closed."""
    silent: bool = False
    """It beat, and has not for longer than the watch allows."""
    unacknowledged: bool | None = None
    """The kernel of its host does not acknowledge what the watch sends; None: not known."""
    excused: float = 0.0
    """Until then its silence means nothing: the job was suspended, and it may be continued later than the launcher."""
    arrived: float | None = None
    """When its hello came, in seconds since 1970; None: not known, or while the launcher was suspended."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it found on its node; see launch.preflight."""
        facts: Mapping[str, Any] = (self.hello or {}).get("facts") or {}
        return facts

    @property
    def host(self) -> str:
        return str((self.hello or {}).get("host", ""))

    @property
    def pid(self) -> int:
        return int((self.hello or {}).get("pid", 0))

    @property
    def node(self) -> int:
        return int((self.hello or {}).get("node", 0))

    @property
    def local_rank(self) -> int:
        return int((self.hello or {}).get("local_rank", 0))

    @property
    def over(self) -> bool:
        """It ended in an orderly way, or was told to."""
        return self.bye is not None or (self.dismissed and self.closed is not None)

    @property
    def died(self) -> bool:
        """Its connection closed and it had said nothing."""
        return self.closed is not None and self.failed is None and not self.over

    @property
    def inside(self) -> bool:
        """It failed in a collective."""
        return self.failed is not None and bool(self.failed.get("inside"))

    @property
    def unheard(self) -> bool:
        """It said hello, is there, and has not beaten yet."""
        return self.joined is not None and self.position is None and self.closed is None and self.failed is None

    def quiet(self, now: float) -> bool:
        """It should beat and does not."""
        alive = self.position is not None and self.failed is None and self.closed is None and not self.over
        return alive and (self.silent or now - max(self.heard or now, self.excused) > QUIET_S)


@dataclass(frozen=True)
class Explanation:
    """What went wrong. `kind`: died, stopped (silent, but its kernel answers), link, stuck (it beats and does not come
    on), failed (an error of its own)."""

    kind: str
    culprits: list[int] = field(default_factory=list)
    """Ranks; empty for a link."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Hosts that do not reach each other."""
    text: str = ""
    """For people; several lines."""


def explain(
    states: Sequence[RankState],
    now: float,
    name: Name,
    exits: Mapping[int, str] | None = None,
    pairs: Mapping[tuple[str, str], bool] | None = None,
    watch_host: str = "",
    stuck_s: float = 300.0,
) -> Explanation | None:
    """The cause of the trouble; None when there is none. `exits` says how processes ended, `pairs` which hosts reach
    each other, `stuck_s` how long nobody may come on."""
    case = _Case(states, now, name, exits or {}, pairs or {}, watch_host, stuck_s)
    return case.ended() or case.silent() or case.consequences() or case.stuck()


class _Case:
    def __init__(
        self,
        states: Sequence[RankState],
        now: float,
        name: Name,
        exits: Mapping[int, str],
        pairs: Mapping[tuple[str, str], bool],
        watch_host: str,
        stuck_s: float,
    ) -> None:
        self.states = {state.rank: state for state in states}
        self.now, self.name, self.exits, self.watch_host, self.stuck_s = now, name, exits, watch_host, stuck_s
        self.broken = sorted(pair for pair, works in pairs.items() if not works)
        self.failures = [s for s in states if s.failed is not None]
        self.quiet = {s.rank for s in states if s.quiet(now)}
        self.last_words = False  # what the others said last counts, not where they were at the first failure

    @cached_property
    def waiting(self) -> Waiting:
        """The waiting graph; only trouble is worth the work."""
        positions = {r: s.position if self.last_words else s.then or s.position for r, s in self.states.items()}
        lost = self.quiet | {rank for rank, state in self.states.items() if state.died}
        return Waiting({rank: state.channels for rank, state in self.states.items()}, positions, lost)

    # --- what ended ----------------------------------------------------------------------------------------------

    def ended(self) -> Explanation | None:
        """A rank that died, or failed by itself: whichever came first."""
        dead = sorted((s for s in self.states.values() if s.died), key=lambda s: s.closed or 0.0)
        own = sorted((s for s in self.failures if not s.inside), key=lambda s: s.failed_at or 0.0)
        if dead or own:  # what the others said last, when they failed, tells what they waited in
            self.last_words = True
        if dead and not (own and (own[0].failed_at or 0.0) < (dead[0].closed or 0.0)):
            first = dead[0].closed or 0.0
            culprits = [s.rank for s in dead if (s.closed or 0.0) - first <= TOGETHER_S]
            unknown = "its connection closed without a word (killed, or out of memory)"
            lines = [self._line(rank, f"died: {self.exits.get(rank, unknown)}") for rank in culprits]
            if any("SIGKILL" in self.exits.get(rank, "") for rank in culprits):
                lines.append("  (if nobody killed it: the system kills a process with SIGKILL when memory runs out)")
            return self._told("died", culprits, lines)
        if own:
            return self._failed(own[0])
        return None

    def _failed(self, state: RankState) -> Explanation:
        said = str((state.failed or {}).get("error", "")).strip().split("\n  ")[:ERROR_LINES]  # indented: to be kept
        error, *more = [" ".join(line.split())[:400] for line in said]
        written = self.exits.get(state.rank, "")
        if not (state.failed or {}).get("position") and written not in error:  # it had no pulse to say it with
            error += f" ({written})"
        lines = [self._line(state.rank, f"failed: {error}"), *(f"    {line}" for line in more)]
        return self._told("failed", [state.rank], lines)

    # --- what says nothing ---------------------------------------------------------------------------------------

    def silent(self) -> Explanation | None:
        """Ranks that do not beat: for long, or for a moment and others have failed waiting."""
        suspects = {r for r in self.quiet if self.states[r].silent}
        if self.failures:
            suspects = self.quiet | {rank for rank, state in self.states.items() if state.unheard}
        if not suspects:
            return None
        cut = self._cut_off()
        if cut:
            return self._link(sorted((self.watch_host, host) for host in cut), cut)
        stopped = sorted(suspects)
        elsewhere = any(not self.waiting.waits(s.rank) for s in self.failures)  # failed waiting at the store
        if elsewhere or any(self.states[rank].silent for rank in stopped) or self.waiting.waiters(stopped):
            return self._told("stopped", stopped, [self._line(rank, self._standstill(rank)) for rank in stopped])
        return None

    def _standstill(self, rank: int) -> str:
        state = self.states[rank]
        if state.unheard:
            return f"has sent no heartbeat, {self.now - (state.joined or self.now):.0f} s after it said hello"
        silence = f"is stopped: no heartbeat for {self.now - (state.heard or self.now):.0f} s"
        if state.unacknowledged is False:
            return f"{silence}, though {state.host or 'its host'} answers (SIGSTOP, a debugger, or the GIL is held)"
        return silence

    def _cut_off(self) -> list[str]:
        """Hosts of which no rank beats, and that acknowledge nothing."""
        hosts: dict[str, list[RankState]] = {}
        for state in self.states.values():
            if state.position is not None and state.closed is None and not state.over:
                hosts.setdefault(state.host, []).append(state)
        return sorted(
            host
            for host, there in hosts.items()
            if host != self.watch_host and all(s.rank in self.quiet and s.unacknowledged for s in there)
        )

    def _link(self, pairs: list[tuple[str, str]], cut: Sequence[str] = ()) -> Explanation:
        """Between hosts; `cut` are those that the launcher itself does not hear."""
        more = [p for p in self.broken if p not in pairs and p[::-1] not in pairs]
        lines = [f"link down: {' and '.join(pair)} do not reach each other" for pair in [*pairs, *more]]
        away = sorted(r for r, s in self.states.items() if s.host in cut)
        if away:
            since = max(self.now - (self.states[r].heard or self.now) for r in away)
            silent = f"{ranks_text(away)} on {', '.join(cut)}"
            lines.append(f"  no word from {silent} for {since:.0f} s, and nothing sent there is acknowledged")
        lines += self._waiters(away) or self._in_what()
        lines += self._after([])
        return Explanation("link", [], [*pairs, *more], "\n".join(lines))

    # --- what waits ----------------------------------------------------------------------------------------------

    def consequences(self) -> Explanation | None:
        """All failures were in collectives: who is it that they waited for?"""
        if not self.failures:
            return None
        roots = self.waiting.roots()
        behind = [r for r in roots if not self.waiting.waits(r)]
        if not behind and self.broken:
            return self._link(self.broken)
        found = behind or roots
        if found and any(self.waiting.waiters(found)):
            return self._behind(found)
        return self._failed(min(self.failures, key=lambda s: s.failed_at or 0.0))

    def stuck(self) -> Explanation | None:
        """Everybody beats and nobody comes on."""
        there = [s for s in self.states.values() if s.position is not None and not s.over]
        if not there or any(self.now - (s.moved or self.now) <= self.stuck_s for s in there):
            return None
        if not any(self.waiting.waits(s.rank) for s in there):
            return None
        roots = self.waiting.roots()
        if self.broken and not any(not self.waiting.waits(r) for r in roots):
            return self._link(self.broken)
        return self._behind(roots or [s.rank for s in there if self.waiting.waits(s.rank)])

    def _behind(self, found: Sequence[int]) -> Explanation:
        lines = []
        for rank in found:
            state = self.states[rank]
            place = describe_call(self.waiting.positions.get(rank) or {})
            since = f" for {self.now - state.moved:.0f} s" if state.moved is not None else ""
            what = f"waits in {place}" if self.waiting.waits(rank) else "computes, and does not come on"
            lines.append(self._line(rank, f"is stuck: it {what}{since}"))
        return self._told("stuck", list(found), lines)

    # --- words ---------------------------------------------------------------------------------------------------

    def _line(self, rank: int, what: str) -> str:
        """Who, where, what, and in which step, action and collective."""
        state = self.states[rank]
        where = f" on {state.host}, pid {state.pid}," if state.hello is not None else ""
        then = " (at its last heartbeat)" if state.position is not None and state.failed is None else ""
        return f"{self.name(rank)}{where} {what}\n  {where_it_was(self.waiting.positions.get(rank))}{then}"

    def _told(self, kind: str, culprits: list[int], lines: list[str]) -> Explanation:
        text = "\n".join([*lines[:SHOWN], *self._waiters(culprits), *self._after(culprits)])
        return Explanation(kind, culprits, [], text)

    def _waiters(self, culprits: Sequence[int]) -> list[str]:
        """Who waited for them, and in what."""
        waiters = [r for r in self.waiting.waiters(culprits) if r not in culprits]
        if not waiters:
            return []
        more = f"; {len(waiters) - SHOWN} more" if len(waiters) > SHOWN else ""
        return [f"  waited for by {'; '.join(self._in(r) for r in waiters[:SHOWN])}{more}"]

    def _in(self, rank: int) -> str:
        return f"rank {rank} in {describe_call(self.waiting.positions.get(rank) or {})}"

    def _in_what(self) -> list[str]:
        waiting = [r for r in sorted(self.states) if self.waiting.waits(r)]
        more = f"; {len(waiting) - SHOWN} more" if len(waiting) > SHOWN else ""
        return [f"  waiting: {'; '.join(self._in(r) for r in waiting[:SHOWN])}{more}"] if waiting else []

    def _after(self, culprits: Sequence[int]) -> list[str]:
        others = sorted(
            s.rank for s in self.states.values() if (s.died or s.failed is not None) and s.rank not in culprits
        )
        return [f"  failed because of it: {ranks_text(others)}"] if others else []


def where_it_was(position: Mapping[str, Any] | None) -> str:
    """`in step 12, train, forward block 3: waiting in tp all_reduce number 45`."""
    if not position:
        return "before its first heartbeat"
    step, action = position.get("step"), position.get("action")
    where = f"in step {step}" if step is not None else "before the first step"
    where += f", {position.get('phase', '')}" + (f", {action}" if action else "")
    call = describe_call(position)
    doing = {"waiting": f"waiting in {call}", "issuing": f"issuing {call}"}.get(str(position.get("state")))
    return f"{where}: {doing or (f'computing, last collective {call}' if call else 'no collective so far')}"


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 2, 4`; the first SHOWN and how many more."""
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}{more}"
