"""All ranks' times on one clock: rank 0's.

Every rank has measured, at the start and at the end of its run, how far rank 0's clock is from its own, each time
within an error. Between the two the distance is taken as linear. What is left of the error can put a message before
its sending; `repair` shifts clocks, within their errors and by as little as possible, until none is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from dist_gpt.events import CALL_COLUMNS, SPAN_COLUMNS
from dist_gpt.report.load import RankLog, Run, ranges

UNKNOWN_DRIFT = 50e-6
"""Allowed for a clock that was read once: quartz is that good."""
WANDER = 1e-6
"""How far a clock may stray from the line between two readings, per ns from the nearer one: temperature, slewing."""
BELIEVED_DRIFT = 1e-3
"""Two readings that differ by more, beyond their errors, are not of one steady clock."""
WORST_ERROR_NS = 10_000_000_000
"""A reading that is further off is none."""
ROUNDS, PUSHES = 8, 200_000
"""Of `repair`: how often it looks again at most, and how much it does in between."""
_ISSUE, _START, _WALL = CALL_COLUMNS.index("issue"), SPAN_COLUMNS.index("start"), SPAN_COLUMNS.index("wall")


@dataclass(frozen=True)
class Line:
    """Rank 0's clock minus another one, by the other one's raw time in ns: known at one or at two times."""

    at: tuple[int, ...]
    offset: tuple[int, ...]
    error: tuple[int, ...]

    @property
    def drift(self) -> float | None:
        """ns per ns; None where it was not measured."""
        return (self.offset[1] - self.offset[0]) / (self.at[1] - self.at[0]) if len(self.at) == 2 else None

    def offset_at(self, raw: np.ndarray) -> np.ndarray:
        """int64 ns."""
        return self.offset[0] + np.rint((raw - self.at[0]) * (self.drift or 0.0)).astype(np.int64)

    def error_at(self, raw: int) -> float:
        """ns. Between two readings at most the worse one's; outside of them it grows."""
        if len(self.at) == 1:
            return self.error[0] + UNKNOWN_DRIFT * abs(raw - self.at[0])
        part = (raw - self.at[0]) / (self.at[1] - self.at[0])
        far = min(abs(raw - at) for at in self.at) if any(self.error) else 0  # rank 0's own has nothing to stray from
        return abs(1 - part) * self.error[0] + abs(part) * self.error[1] + WANDER * far


@dataclass
class RankClock:
    """One rank's clock. `first` and `last` are raw times between which it is used; `shift` ns is what was repaired."""

    base_ns: int
    line: Line | None
    first: int
    last: int
    shift: int = 0

    @property
    def error_ns(self) -> int:
        """Largest error while it is used."""
        return 0 if self.line is None else ceil(max(map(self.line.error_at, (self.first, self.last))))


@dataclass
class Clocks:
    """Maps of all ranks' times to ns on rank 0's raw clock since `origin`, which lies before every recorded row."""

    ranks: dict[int, RankClock] = field(default_factory=dict)
    origin: int = 0

    def usable(self, rank: int) -> bool:
        """Whether the rank's times can be compared with those of others."""
        return self.ranks[rank].line is not None

    def to_origin(self, rank: int, t: np.ndarray) -> np.ndarray:
        """int64 ns since `origin`, of times since the rank's header. A clock that is not usable starts with origin."""
        clock = self.ranks[rank]
        raw = clock.base_ns + np.asarray(t, dtype=np.int64)
        if clock.line is None:
            return raw - clock.first
        return raw + clock.line.offset_at(raw) + (clock.shift - self.origin)

    @property
    def table(self) -> list[dict[str, Any]]:
        """Per rank {rank, offset_s (rank 0's clock minus this one, when the rank's rows begin), drift_ppm, error_s,
        repaired_s}; null where it is not known."""
        rows = []
        for rank, clock in self.ranks.items():
            row: dict[str, Any] = {"rank": rank, **dict.fromkeys(("offset_s", "drift_ppm", "error_s", "repaired_s"))}
            if clock.line is not None:
                row["offset_s"] = int(clock.line.offset_at(np.array(clock.first))) / 1e9
                row["drift_ppm"] = None if clock.line.drift is None else clock.line.drift * 1e6
                row["error_s"] = clock.error_ns / 1e9
                row["repaired_s"] = clock.shift / 1e9
            rows.append(row)
        return rows

    @property
    def largest_repair_s(self) -> float:
        """How far the most repaired clock was shifted."""
        return max((abs(clock.shift) for clock in self.ranks.values()), default=0) / 1e9


def align(run: Run) -> Clocks:
    """Clocks of all ranks of `run`; tells in `run.problems` which cannot be compared."""
    lines = {rank: _line(log, run.problems) for rank, log in run.ranks.items()}
    by_host: dict[str, Line] = {}
    for rank, log in run.ranks.items():
        if (line := lines[rank]) is not None and log.header["host"]:
            by_host.setdefault(log.header["host"], line)
    clocks = Clocks()
    for rank, log in run.ranks.items():
        base = log.header["base_ns"]
        first, last = _used(log)
        line = lines[rank] or by_host.get(log.header["host"] or "")
        clocks.ranks[rank] = RankClock(base, line, base + first, base + last)
    if lost := [rank for rank, clock in clocks.ranks.items() if clock.line is None]:
        run.problems.append(
            f"rank{'s' if len(lost) > 1 else ''} {ranges(lost)}: no clock reading; who waited for them is not known"
        )
    starts = [c.first + int(c.line.offset_at(np.array(c.first))) for c in clocks.ranks.values() if c.line is not None]
    clocks.origin = min(starts, default=0) - max((clock.error_ns for clock in clocks.ranks.values()), default=0) - 1
    return clocks


def _line(log: RankLog, problems: list[str]) -> Line | None:
    """From a rank's own readings, None without any. Rank 0's clock is the one that all are compared with."""
    if log.rank == 0:
        return Line((0, 1), (0, 0), (0, 0))
    base = log.header["base_ns"]
    readings = sorted(
        (base + reading["at_ns"], reading["offset_ns"], reading["error_ns"])
        for reading in log.clocks
        if 0 <= reading["error_ns"] <= WORST_ERROR_NS
    )
    if not readings:
        return None
    alone = Line(*((value,) for value in readings[0]))
    if readings[-1][0] == readings[0][0]:
        return alone
    line = Line(*zip(readings[0], readings[-1], strict=True))
    doubt = sum(line.error) / (line.at[1] - line.at[0])
    if abs(line.drift or 0.0) <= min(BELIEVED_DRIFT + doubt, 0.1):
        return line
    problems.append(f"rank {log.rank}: its two clock readings contradict each other; the first is taken alone")
    return alone


def _used(log: RankLog) -> tuple[int, int]:
    """Between which times, since the header, a rank recorded rows; without rows, its steps."""
    edges = [column for column in (log.calls[:, _ISSUE], log.spans[:, _START]) if len(column)]
    if edges:
        ends = [*edges, *([log.spans[:, _START] + log.spans[:, _WALL]] if len(log.spans) else [])]
        return int(min(column.min() for column in edges)), int(max(column.max() for column in ends))
    starts = [step["start_ns"] for step in log.steps if step["start_ns"] is not None]
    return min(starts, default=0), max(starts, default=0)


# --- causality ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """Calls sorted by meeting, as `repair` sees them: n rows, of which meeting i has those from first[i] on.

    A `cause` is issued before any `effect` of its meeting is complete.
    """

    first: np.ndarray
    meeting: np.ndarray
    clock: np.ndarray  # position of the row's rank in `errors`
    issue: np.ndarray  # ns
    complete: np.ndarray  # ns, when the row's rank knew of the end
    cause: np.ndarray  # bool
    effect: np.ndarray  # bool


def repair(heard: Heard, errors: np.ndarray) -> np.ndarray:
    """Shifts (int64 ns, one per clock, none beyond its error) after which effects follow their causes, where that is
    possible; the sum of (shift / error)^2 is the least. All are 0 where nothing is wrong.

    Only pairs of clocks that were seen to contradict each other are constrained: of a world of ranks few are.
    """
    shifts = np.zeros(len(errors), dtype=np.int64)
    apart = _Apart(errors)
    for _ in range(ROUNDS):
        if not apart.demand(_contradictions(heard, shifts)):
            break
        shifts = apart.settle()
    return shifts


def last_causes(heard: Heard, issue: np.ndarray) -> np.ndarray:
    """Per meeting the row of the cause that was issued last, at times `issue`; -1 where no cause was seen."""
    never = np.iinfo(np.int64).min
    at = np.where(heard.cause, issue, never)
    arrival = np.maximum.reduceat(at, heard.first) if len(at) else at
    last = np.full(len(heard.first), -1, dtype=np.int64)
    rows = np.flatnonzero(heard.cause & (at == arrival[heard.meeting]))[::-1]
    last[heard.meeting[rows]] = rows  # of several the first one stays
    return last


def _contradictions(heard: Heard, shifts: np.ndarray) -> dict[tuple[int, int], int]:
    """{(clock of a cause, clock of its effect): ns by which the second must be shifted more than the first}."""
    shift = shifts[heard.clock]
    cause = last_causes(heard, heard.issue + shift)[heard.meeting]
    late = heard.effect & (cause >= 0) & (heard.complete + shift < (heard.issue + shift)[cause])
    rows = np.flatnonzero(late)
    causes = cause[rows]
    keys, place = np.unique(heard.clock[causes] * len(shifts) + heard.clock[rows], return_inverse=True)
    least = np.full(len(keys), np.iinfo(np.int64).min)
    np.maximum.at(least, place, heard.issue[causes] - heard.complete[rows])
    found = zip(keys.tolist(), least.tolist(), strict=True)
    return {divmod(key, len(shifts)): value for key, value in found}


class _Apart:
    """Least shifts under inequalities "clock b at least so much more than clock a", by Hildreth's method: each
    inequality in turn pushes its two clocks apart by what it lacks, or lets go of what it pushed too much.

    The bounds are inequalities against a clock that does not move. What was pushed is kept when more is demanded.
    """

    def __init__(self, errors: np.ndarray) -> None:
        self.errors = errors
        self._weight = [float(error) ** 2 for error in errors] + [0.0]
        self._shift = [0.0] * len(self._weight)
        self._least: dict[tuple[int, int], float] = {}  # (a, b) -> ns
        self._pushed: dict[tuple[int, int], float] = {}

    def demand(self, pairs: dict[tuple[int, int], int]) -> bool:
        """Add inequalities; whether that changes anything. What is more than both errors is no matter of clocks."""
        changed = False
        still, errors = len(self.errors), self.errors.tolist()
        for pair, least in pairs.items():
            known = self._least.get(pair)
            if least > errors[pair[0]] + errors[pair[1]] or (known is not None and least < known):
                continue
            self._least[pair] = least + 1.0  # for rounding
            changed = True
            for clock in pair:
                if errors[clock]:
                    self._least[still, clock] = self._least[clock, still] = -float(errors[clock])
        return changed

    def settle(self) -> np.ndarray:
        """The shifts, int64 ns."""
        shift, weight = self._shift, self._weight
        for _ in range(PUSHES // max(1, len(self._least))):
            moved = 0.0
            for pair, least in self._least.items():
                a, b = pair
                before = self._pushed.get(pair, 0.0)
                both = weight[a] + weight[b] or 1.0
                push = max(-before, (least - shift[b] + shift[a]) / both)
                if push:
                    self._pushed[pair] = before + push
                    shift[a] -= push * weight[a]
                    shift[b] += push * weight[b]
                    moved = max(moved, abs(push) * both)
            if moved < 0.25:
                break
        return np.clip(np.rint(shift[:-1]).astype(np.int64), -self.errors, self.errors)
