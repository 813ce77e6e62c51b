"""Find which rank kept which waiting, and which rank was the cause.

The rank that issues last keeps the others waiting, but it may itself have been kept waiting before. Every rank carries
the delays that it suffered in a step, by cause. When a rank waits for another, the wait is charged first to the delays
that the other one suffered and it did not (in proportion), and only the rest to the other one itself.

    rank 2 sleeps 40 ms;  its tp partner 3 waits 40 ms for it;  in the next reduction rank 0 waits 40 ms for rank 3:
    both waits are rank 2's.

Waits in a pipeline's receive pass delays on, but are bubble and are not charged; see pipeline.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_gpt.events import OPS
from dist_gpt.report.analysis.match import Calls, Meetings
from dist_gpt.report.analysis.time_breakdown import Blocked, Budget

LEAST_SHARE = 1e-4
"""Waits of up to this share of a step are charged to the rank that came last, without looking for what delayed it."""
PERSISTENT = 0.7
"""Smallest share of the steps at which a rank that is their worst cause is called persistent."""
SLOW = 1.05
MOST_RANKS = 64
"""Most rows of the matrix; more ranks are summed in blocks of neighbours."""
_RECV = OPS.index("recv")
Causes = dict[int, float]


@dataclass
class Charges:
    """Waiting in ns by (cause, victim), by (cause, step), by (cause, axis), and by the rank that came last."""

    pairs: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    steps: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    axes: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    last: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, cause: int, victim: int, step: int, axis: str, ns: float) -> None:
        """Charge `ns` that `victim` waited to `cause`."""
        self.pairs[cause, victim] += ns
        self.steps[cause, step] += ns
        self.axes[cause, axis] += ns

    def caused(self) -> dict[int, float]:
        """Return the ns of waiting by cause."""
        total: dict[int, float] = defaultdict(float)
        for (cause, _), ns in self.pairs.items():
            total[cause] += ns
        return dict(total)


def charge(calls: Calls, meetings: Meetings, stood: Blocked, budget: Budget) -> Charges:
    """Charge every wait of the window, in the order in which the last members came."""
    charges = Charges()
    lost = np.where(calls.op == _RECV, stood.bubble, stood.wait)
    least = LEAST_SHARE * float(budget.wall[budget.wall > 0].mean()) if (budget.wall > 0).any() else 0.0
    met = calls.meeting >= 0
    _charge_short(charges, calls, meetings, np.flatnonzero(met & (lost > 0) & (lost <= least)), lost)
    rows = np.flatnonzero(met & (lost > least))
    rows = rows[np.lexsort((meetings.arrival[calls.meeting[rows]], calls.step[rows]))]
    suffered: dict[int, Causes] = defaultdict(lambda: defaultdict(float))
    step = None
    columns = (calls.rank, calls.step, calls.op, calls.axis, lost)
    culprits = meetings.culprit[calls.meeting[rows]].tolist()
    for culprit, victim, at, op, axis, ns in zip(culprits, *(c[rows].tolist() for c in columns), strict=True):
        if at != step:
            step = at
            suffered.clear()
        for cause, part in _causes(suffered[culprit], suffered[victim], culprit, ns, victim).items():
            suffered[victim][cause] += part
            if op != _RECV:
                charges.add(cause, victim, at, calls.axes[axis], part)
        if op != _RECV:
            charges.last[culprit] += ns
    return charges


def _charge_short(charges: Charges, calls: Calls, meetings: Meetings, rows: np.ndarray, lost: np.ndarray) -> None:
    rows = rows[calls.op[rows] != _RECV]
    size = int(calls.rank.max(initial=0)) + 1
    culprit = meetings.culprit[calls.meeting[rows]]
    steps, step_at = np.unique(calls.step[rows], return_inverse=True)
    keys = ((culprit * size + calls.rank[rows]) * len(steps) + step_at) * len(calls.axes) + calls.axis[rows]
    unique, inverse = np.unique(keys, return_inverse=True)
    for key, ns in zip(unique.tolist(), np.bincount(inverse, weights=lost[rows]).tolist(), strict=True):
        rest, axis = divmod(key, len(calls.axes))
        rest, step = divmod(rest, len(steps))
        cause, victim = divmod(rest, size)
        charges.add(cause, victim, int(steps[step]), calls.axes[axis], ns)
        charges.last[cause] += ns


def _causes(theirs: Causes, mine: Causes, culprit: int, ns: float, victim: int) -> Causes:
    """Return the `ns` that `victim` waited for `culprit`, by cause.

    Delays of the culprit that the victim caused do not count: the victim lost that time first, so they cost it no wait.
    """
    inherited = {c: d - mine.get(c, 0.0) for c, d in theirs.items() if c != victim and d > mine.get(c, 0.0)}
    total = sum(inherited.values())
    scale = min(1.0, ns / total) if total else 0.0
    causes = {c: d * scale for c, d in inherited.items()}
    causes[culprit] = causes.get(culprit, 0.0) + ns - sum(causes.values())
    return causes


def document(charges: Charges, budget: Budget, computing: np.ndarray) -> dict[str, Any]:
    """Return the `stragglers` of a report. `computing`: ns by (rank, step) of computing, descheduled or not."""
    steps = max(1, len(budget.steps))
    ranks = budget.ranks
    block = -(-len(ranks) // MOST_RANKS)
    place = {rank: i // block for i, rank in enumerate(ranks)}
    matrix = np.zeros((-(-len(ranks) // block),) * 2)
    for (cause, victim), ns in charges.pairs.items():
        matrix[place[cause], place[victim]] += ns / 1e9 / steps
    caused = charges.caused()
    shown = sorted(caused, key=lambda rank: -caused[rank])[:8]
    last = sum(charges.last.values()) or 1.0
    culprits = [
        {
            "rank": rank,
            "caused_s": caused[rank] / 1e9 / steps,
            "last_share": charges.last[rank] / last,
            "kind": "persistent" if _worst_share(charges, budget, rank) >= PERSISTENT else "transient",
            "worst_in_share_of_steps": _worst_share(charges, budget, rank),
            "axes": {axis: ns / 1e9 / steps for (cause, axis), ns in sorted(charges.axes.items()) if cause == rank},
        }
        for rank in shown
        if caused[rank] > 0
    ]
    mean = computing.mean(axis=1)
    median = float(np.median(mean)) if len(mean) else 0.0
    slow = [{"rank": rank, "ratio": float(mean[i] / median)} for i, rank in enumerate(ranks)] if median else []
    slow = sorted((row for row in slow if row["ratio"] > SLOW), key=lambda row: -row["ratio"])
    return {
        "ranks": ranks[::block],
        "grouped": block > 1,
        "matrix_s": matrix.tolist(),
        "heat": {"steps": budget.steps, "ranks": ranks, "compute_s": (computing / 1e9).tolist()},
        "caused_s": [ns / 1e9 / steps for ns in caused.values()],
        "culprits": culprits,
        "slow_compute": slow,
    }  # fmt: skip


def _worst_share(charges: Charges, budget: Budget, rank: int) -> float:
    """Return the share of the steps in which `rank` caused more waiting than any other."""
    worst: dict[int, tuple[float, int]] = {}
    for (cause, step), ns in charges.steps.items():
        worst[step] = max(worst.get(step, (0.0, -1)), (ns, cause))
    return sum(cause == rank for _, cause in worst.values()) / max(1, len(budget.steps))
