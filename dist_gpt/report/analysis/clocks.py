"""Alignment of all ranks' times to one clock, rank 0's.

At the start and at the end of its run, every rank measures the offset of rank 0's clock from its own, each time within
an error. Between the two the offset is taken as linear. The remaining error can put a message's receipt before its
sending; `repair` shifts clocks, within their errors and by as little as possible, until none is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np

from dist_gpt.events import CALL_COLUMNS, SPAN_COLUMNS
from dist_gpt.report.read.load import RankLog, Run, ranges

UNKNOWN_DRIFT = 50e-6
"""Drift, in ns per ns, allowed for a clock that was read only once: quartz is that good."""
WANDER = 1e-6
"""Error per ns from the nearer reading: a clock strays from the line of its readings (temperature, slewing)."""
BELIEVED_DRIFT = 1e-3
"""Largest credible drift: two readings that drift more, beyond their errors, are not of one steady clock."""
WORST_ERROR_NS = 10_000_000_000
"""Readings with a larger error are ignored."""
ROUNDS, PUSHES = 8, 200_000
"""Limits of `repair`: rounds in which it looks for contradictions, and pushes in each round."""
_ISSUE, _START, _WALL = CALL_COLUMNS.index("issue"), SPAN_COLUMNS.index("start"), SPAN_COLUMNS.index("wall")


@dataclass(frozen=True)
class Line:
    """Offset of rank 0's clock from another one, by the other one's raw time in ns: known at one or at two times."""

    at: tuple[int, ...]
    offset: tuple[int, ...]
    error: tuple[int, ...]

    @property
    def drift(self) -> float | None:
        """Drift in ns per ns; None where it was not measured."""
        return (self.offset[1] - self.offset[0]) / (self.at[1] - self.at[0]) if len(self.at) == 2 else None

    def offset_at(self, raw: np.ndarray) -> np.ndarray:
        """Return the offset at raw times, in int64 ns."""
        return self.offset[0] + np.rint((raw - self.at[0]) * (self.drift or 0.0)).astype(np.int64)

    def error_at(self, raw: int) -> float:
        """Return the error at a raw time, in ns: interpolated between two readings, growing outside, plus WANDER."""
        if len(self.at) == 1:
            return self.error[0] + UNKNOWN_DRIFT * abs(raw - self.at[0])
        part = (raw - self.at[0]) / (self.at[1] - self.at[0])
        far = min(abs(raw - at) for at in self.at) if any(self.error) else 0  # rank 0's clock cannot stray from itself
        return abs(1 - part) * self.error[0] + abs(part) * self.error[1] + WANDER * far


@dataclass
class RankClock:
    """Clock of one rank, used between the raw times `first` and `last`; `shift` is its repair in ns."""

    base_ns: int
    line: Line | None
    first: int
    last: int
    shift: int = 0

    @property
    def error_ns(self) -> int:
        """Largest error in ns while the clock is used."""
        return 0 if self.line is None else ceil(max(map(self.line.error_at, (self.first, self.last))))


@dataclass
class Clocks:
    """Maps of all ranks' times to ns on rank 0's raw clock since `origin`, which lies before every recorded row."""

    ranks: dict[int, RankClock] = field(default_factory=dict)
    origin: int = 0

    def usable(self, rank: int) -> bool:
        """Return whether the rank's times can be compared with those of other ranks."""
        return self.ranks[rank].line is not None

    def to_origin(self, rank: int, t: np.ndarray) -> np.ndarray:
        """Return `t`, ns since the rank's header, as int64 ns since `origin` (unusable clock: since its first use)."""
        clock = self.ranks[rank]
        raw = clock.base_ns + np.asarray(t, dtype=np.int64)
        if clock.line is None:
            return raw - clock.first
        return raw + clock.line.offset_at(raw) + (clock.shift - self.origin)

    @property
    def table(self) -> list[dict[str, Any]]:
        """Per rank {rank, offset_s, drift_ppm, error_s, repaired_s}; None where a value is not known.

        `offset_s` is rank 0's clock minus this one when the rank's rows begin.
        """
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
        """Shift of the most repaired clock, in seconds."""
        return max((abs(clock.shift) for clock in self.ranks.values()), default=0) / 1e9


def align(run: Run) -> Clocks:
    """Return the clocks of all ranks of `run`; note in `run.problems` which ones cannot be compared."""
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
            f"rank{'s' if len(lost) > 1 else ''} {ranges(lost)}: no clock reading; the time that other ranks "
            f"waited for {'them' if len(lost) > 1 else 'it'} is not known"
        )
    starts = [c.first + int(c.line.offset_at(np.array(c.first))) for c in clocks.ranks.values() if c.line is not None]
    clocks.origin = min(starts, default=0) - max((clock.error_ns for clock in clocks.ranks.values()), default=0) - 1
    return clocks


def _line(log: RankLog, problems: list[str]) -> Line | None:
    """Return the line through a rank's own readings, None without any; rank 0's clock is the reference."""
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
    problems.append(f"rank {log.rank}: its two clock readings contradict each other; only the first is used")
    return alone


def _used(log: RankLog) -> tuple[int, int]:
    """Return the first and last time, in ns since the header, of a rank's rows; without rows, of its steps' starts."""
    edges = [column for column in (log.calls[:, _ISSUE], log.spans[:, _START]) if len(column)]
    if edges:
        ends = [*edges, *([log.spans[:, _START] + log.spans[:, _WALL]] if len(log.spans) else [])]
        return int(min(column.min() for column in edges)), int(max(column.max() for column in ends))
    starts = [step["start_ns"] for step in log.steps if step["start_ns"] is not None]
    return min(starts, default=0), max(starts, default=0)


# --- causality ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """Calls sorted by meeting, the input of `repair`: n rows, of which meeting i has those from first[i] on.

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
    """Return the least shifts, one per clock and within its error, after which effects follow their causes if possible.

    Shifts are int64 ns with the least sum of (shift / error)^2; all are 0 where nothing is wrong. Only pairs of clocks
    that were seen to contradict each other are constrained, which are few even with many ranks.
    """
    shifts = np.zeros(len(errors), dtype=np.int64)
    apart = _Apart(errors)
    for _ in range(ROUNDS):
        if not apart.demand(_contradictions(heard, shifts)):
            break
        shifts = apart.settle()
    return shifts


def last_causes(heard: Heard, issue: np.ndarray) -> np.ndarray:
    """Return, per meeting, the row of the cause that was issued last according to `issue`; -1 where none was seen."""
    never = np.iinfo(np.int64).min
    at = np.where(heard.cause, issue, never)
    arrival = np.maximum.reduceat(at, heard.first) if len(at) else at
    last = np.full(len(heard.first), -1, dtype=np.int64)
    rows = np.flatnonzero(heard.cause & (at == arrival[heard.meeting]))[::-1]
    last[heard.meeting[rows]] = rows  # of equal ones the first stays
    return last


def _contradictions(heard: Heard, shifts: np.ndarray) -> dict[tuple[int, int], int]:
    """Return {(clock of a cause, of its effect): ns by which the second must be shifted more than the first}."""
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
    """Least shifts under inequalities "clock b at least so much more than clock a", by Hildreth's method.

    Each inequality in turn pushes its two clocks apart by what it lacks, or takes back what it pushed too much. The
    bounds are inequalities against a clock that does not move. Pushes are kept when more inequalities are added.
    """

    def __init__(self, errors: np.ndarray) -> None:
        self.errors = errors
        self._weight = [float(error) ** 2 for error in errors] + [0.0]
        self._shift = [0.0] * len(self._weight)
        self._least: dict[tuple[int, int], float] = {}  # (a, b) -> ns
        self._pushed: dict[tuple[int, int], float] = {}

    def demand(self, pairs: dict[tuple[int, int], int]) -> bool:
        """Add inequalities; return whether any is new. One beyond both clocks' errors is not due to clocks: ignored."""
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
        """Return the shifts in int64 ns, by pushing until nothing moves or PUSHES are used up."""
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
