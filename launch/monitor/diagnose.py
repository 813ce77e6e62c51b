"""Explain why a job died or hangs: find the rank, link or collective at fault from the ranks' last messages.

`explain(states, now, name)` is pure: it takes states from launch.monitor.heartbeat_server and returns an
Explanation with text for users. Times are in seconds of the launcher's own clock, which leaves out suspensions of the
job (dist_gpt.awake).

A rank whose connection closed without a message died. A rank that sends no heartbeat while its kernel acknowledges is
stopped; a whole host that acknowledges nothing is a broken link. Errors inside a collective are consequences: the
waiting graph (which rank waits for which, in which call of which group) leads to the rank that is behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from launch.monitor.wait_graph import Waiting, describe_call

QUIET_S = 4.0
"""Seconds, eight missed heartbeats: enough to suspect a rank once others have failed, even on an overloaded machine."""
TOGETHER_S = 0.2
"""Ranks whose connections close within this many seconds died together."""
SHOWN = 8
ERROR_LINES = 10
Name = Callable[[int], str]


@dataclass(frozen=True)
class RankState:
    """State of one rank as the watch knows it; times in seconds of the launcher's AwakeClock."""

    rank: int
    hello: Mapping[str, Any] | None = None
    """First message of the rank; None until it arrives."""
    rivals: tuple[Mapping[str, Any], ...] = ()
    """Hello messages of other processes that claim this rank."""
    joined: float | None = None
    heard: float | None = None
    position: Mapping[str, Any] | None = None
    """`Ledger.position()` in its last heartbeat or its failure; None before the first heartbeat."""
    then: Mapping[str, Any] | None = None
    """Its position when the first rank of the job failed; what it does later is a consequence."""
    moved: float | None = None
    """Time at which its position last changed."""
    channels: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    """Its groups (axis, ranks, direction), in the order of `counts` in its position."""
    failed: Mapping[str, Any] | None = None
    """{"error", "inside", "position"}, and "code", its exit code, if known."""
    failed_at: float | None = None
    bye: int | None = None
    """Exit code that it announced."""
    closed: float | None = None
    dismissed: bool = False
    """True if it was told to exit before its connection closed."""
    silent: bool = False
    """True if it sent heartbeats, but none for longer than the watch allows."""
    unacknowledged: bool | None = None
    """True if the kernel of its host does not acknowledge what the watch sends; None: not known."""
    excused: float = 0.0
    """Time until which its silence means nothing: after a suspension it may be continued later than the launcher."""
    arrived: float | None = None
    """Arrival of its hello, in seconds since 1970; None: not known, or about when the launcher was suspended."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts that it found on its node (launch.rank.node_info)."""
        facts: Mapping[str, Any] = (self.hello or {}).get("facts") or {}
        return facts

    @property
    def host(self) -> str:
        """Name of its host; empty before its hello."""
        return str((self.hello or {}).get("host", ""))

    @property
    def pid(self) -> int:
        """Process ID; 0 before its hello."""
        return int((self.hello or {}).get("pid", 0))

    @property
    def node(self) -> int:
        """Number of its node; 0 before its hello."""
        return int((self.hello or {}).get("node", 0))

    @property
    def local_rank(self) -> int:
        """Rank on its node; 0 before its hello."""
        return int((self.hello or {}).get("local_rank", 0))

    @property
    def over(self) -> bool:
        """True if it announced its end, or ended after it was told to exit."""
        return self.bye is not None or (self.dismissed and self.closed is not None)

    @property
    def died(self) -> bool:
        """True if its connection closed without any announcement of its end."""
        return self.closed is not None and self.failed is None and not self.over

    @property
    def inside(self) -> bool:
        """True if it failed in a collective."""
        return self.failed is not None and bool(self.failed.get("inside"))

    @property
    def unheard(self) -> bool:
        """True if it said hello and is connected, but has sent no heartbeat yet."""
        return self.joined is not None and self.position is None and self.closed is None and self.failed is None

    def quiet(self, now: float) -> bool:
        """Return whether it should send heartbeats and does not."""
        alive = self.position is not None and self.failed is None and self.closed is None and not self.over
        return alive and (self.silent or now - max(self.heard or now, self.excused) > QUIET_S)


@dataclass(frozen=True)
class Explanation:
    """Cause of a failed or hanging job."""

    kind: str
    """died, stopped (silent, but its kernel answers), link, stuck (beats without progress), failed (own error)."""
    culprits: list[int] = field(default_factory=list)
    """Ranks at fault; empty for a link."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of hosts that do not reach each other."""
    text: str = ""
    """Text for users, of several lines."""


def explain(
    states: Sequence[RankState],
    now: float,
    name: Name,
    exits: Mapping[int, str] | None = None,
    pairs: Mapping[tuple[str, str], bool] | None = None,
    watch_host: str = "",
    stuck_s: float = 300.0,
) -> Explanation | None:
    """Return the cause of a failure or hang; None if there is none.

    `exits`: how processes ended; `pairs`: which hosts reach each other; `stuck_s`: seconds allowed without progress.
    """
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
        self.last_words = False  # use last positions, not those at the first failure

    @cached_property
    def waiting(self) -> Waiting:
        """Waiting graph, built only when there is something to explain."""
        positions = {r: s.position if self.last_words else s.then or s.position for r, s in self.states.items()}
        lost = self.quiet | {rank for rank, state in self.states.items() if state.died}
        return Waiting({rank: state.channels for rank, state in self.states.items()}, positions, lost)

    # --- ended ranks ---------------------------------------------------------------------------------------------

    def ended(self) -> Explanation | None:
        """Return an explanation by the first rank that died or failed by itself; None if there is none."""
        dead = sorted((s for s in self.states.values() if s.died), key=lambda s: s.closed or 0.0)
        own = sorted((s for s in self.failures if not s.inside), key=lambda s: s.failed_at or 0.0)
        if dead or own:  # the others' last positions show what they waited in
            self.last_words = True
        if dead and not (own and (own[0].failed_at or 0.0) < (dead[0].closed or 0.0)):
            first = dead[0].closed or 0.0
            culprits = [s.rank for s in dead if (s.closed or 0.0) - first <= TOGETHER_S]
            unknown = "its connection closed without a message (killed, or out of memory)"
            lines = [self._line(rank, f"died: {self.exits.get(rank, unknown)}") for rank in culprits]
            if any("SIGKILL" in self.exits.get(rank, "") for rank in culprits):
                lines.append("  (if it was not killed on purpose: the kernel sends SIGKILL when memory runs out)")
            return self._told("died", culprits, lines)
        if own:
            return self._failed(own[0])
        return None

    def _failed(self, state: RankState) -> Explanation:
        said = str((state.failed or {}).get("error", "")).strip().split("\n  ")[:ERROR_LINES]  # indented: kept
        error, *more = [" ".join(line.split())[:400] for line in said]
        written = self.exits.get(state.rank, "")
        if not (state.failed or {}).get("position") and written not in error:  # it failed before its heartbeat began
            error += f" ({written})"
        lines = [self._line(state.rank, f"failed: {error}"), *(f"    {line}" for line in more)]
        return self._told("failed", [state.rank], lines)

    # --- silent ranks --------------------------------------------------------------------------------------------

    def silent(self) -> Explanation | None:
        """Return an explanation by ranks without heartbeats: for long, or shortly while others failed waiting."""
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
            return f"has sent no heartbeat since it connected {self.now - (state.joined or self.now):.0f} s ago"
        silence = f"is stopped: no heartbeat for {self.now - (state.heard or self.now):.0f} s"
        if state.unacknowledged is False:
            return f"{silence}, though {state.host or 'its host'} answers (SIGSTOP, a debugger, or the GIL is held)"
        return silence

    def _cut_off(self) -> list[str]:
        """Return the hosts that acknowledge nothing and whose ranks all send no heartbeat."""
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
        """Return an explanation by broken links between hosts; `cut`: hosts that the launcher itself does not hear."""
        more = [p for p in self.broken if p not in pairs and p[::-1] not in pairs]
        lines = [f"link down: {' and '.join(pair)} cannot reach each other" for pair in [*pairs, *more]]
        away = sorted(r for r, s in self.states.items() if s.host in cut)
        if away:
            since = max(self.now - (self.states[r].heard or self.now) for r in away)
            silent = f"{ranks_text(away)} on {', '.join(cut)}"
            lines.append(f"  no message from {silent} for {since:.0f} s, and nothing sent there is acknowledged")
        lines += self._waiters(away) or self._in_what()
        lines += self._after([])
        return Explanation("link", [], [*pairs, *more], "\n".join(lines))

    # --- waiting ranks -------------------------------------------------------------------------------------------

    def consequences(self) -> Explanation | None:
        """Return an explanation by the ranks that others, which all failed in collectives, waited for."""
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
        """Return an explanation if all ranks send heartbeats and none makes progress; else None."""
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
            what = f"waits in {place}" if self.waiting.waits(rank) else "is computing but making no progress"
            lines.append(self._line(rank, f"is stuck{since}: it {what}"))
        return self._told("stuck", list(found), lines)

    # --- text ----------------------------------------------------------------------------------------------------

    def _line(self, rank: int, what: str) -> str:
        """Return the rank, its host, what happened, and its step, action and collective."""
        state = self.states[rank]
        where = f" on {state.host}, pid {state.pid}," if state.hello is not None else ""
        then = " (at its last heartbeat)" if state.position is not None and state.failed is None else ""
        return f"{self.name(rank)}{where} {what}\n  {where_it_was(self.waiting.positions.get(rank))}{then}"

    def _told(self, kind: str, culprits: list[int], lines: list[str]) -> Explanation:
        text = "\n".join([*lines[:SHOWN], *self._waiters(culprits), *self._after(culprits)])
        return Explanation(kind, culprits, [], text)

    def _waiters(self, culprits: Sequence[int]) -> list[str]:
        """Return a line on the ranks that waited for `culprits`, and in which calls; empty if there are none."""
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
    """Return `in step 12, train, forward block 3: waiting in tp all_reduce number 45`."""
    if not position:
        return "before its first heartbeat"
    step, action = position.get("step"), position.get("action")
    where = f"in step {step}" if step is not None else "before the first step"
    where += f", {position.get('phase', '')}" + (f", {action}" if action else "")
    call = describe_call(position)
    doing = {"waiting": f"waiting in {call}", "issuing": f"issuing {call}"}.get(str(position.get("state")))
    return f"{where}: {doing or (f'computing, last collective {call}' if call else 'no collective so far')}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Return `rank 3` or `ranks 1, 2, 4`: the first SHOWN, and how many more."""
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}{more}"
