"""`bubble`: compare the simulated bubble with the published formulas, for every legal case.

GPipe and 1F1B: (p-1)/(m+p-1); interleaved 1F1B: (p-1)/(vm+p-1) (arXiv:2104.04473, section 2). All chunks cost the same,
a backward costs twice a forward, and messages cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.result import Result, Row
from benchmarks.settings import Settings
from dist_gpt.schedule.action import Action, Op
from dist_gpt.schedule.orders import SCHEDULES, make_orders, placement
from dist_gpt.schedule.simulate import simulate

NAME = "bubble"
TARGET = 1e-12
STAGES, MICRO_BATCHES, VIRTUAL = 16, 64, 4
NAMES = ("gpipe", "1f1b", "interleaved")
Case = tuple[str, int, int, int]


def cases() -> Iterator[Case]:
    """Yield (schedule, p, v, m) for all legal p <= 16 and m <= 64; interleaved with 2 to 4 virtual stages."""
    for name in NAMES:
        for p in range(1, STAGES + 1):
            for v in range(1, VIRTUAL + 1):
                yield from ((name, p, v, m) for m in range(1, MICRO_BATCHES + 1) if SCHEDULES[name].legal(p, v, m))


def simulated(case: Case) -> float:
    """Return the simulated idle fraction of the step, the mean over ranks."""
    name, p, v, m = case
    return simulate(make_orders(*case), placement(name, p, v), cost).bubble


def cost(rank: int, action: Action) -> float:
    """Return the cost of an action: 1 for a forward, 2 for a backward."""
    return {Op.F: 1.0, Op.B: 2.0}[action.op]


def formula(case: Case) -> float:
    """Return the published idle fraction of the step; v is 1 unless interleaved."""
    _, p, v, m = case
    return (p - 1) / (v * m + p - 1)


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Compare every case once: it is arithmetic, so there is nothing to repeat."""
    worst: dict[str, tuple[float, Case]] = {}
    counts = dict.fromkeys(NAMES, 0)
    for case in cases():
        name = case[0]
        counts[name] += 1
        error = abs(simulated(case) - formula(case))
        if name not in worst or error > worst[name][0]:
            worst[name] = error, case
    what = f"simulated bubble against the formulas, p <= {STAGES}, m <= {MICRO_BATCHES}, v <= {VIRTUAL} where legal"
    result = Result(NAME, what, settings.document())
    for name in NAMES:
        error, case = worst[name]
        say(f"{name}: {counts[name]} cases, largest deviation {error:.2e} at p, v, m = {case[1:]}")
        result.rows += [
            Row(f"{name}: cases", counts[name]),
            Row(f"{name}: largest deviation", error, target=TARGET, at_least=False),
        ]
        result.raw[name] = {"cases": counts[name], "worst": error, "at": case[1:]}
    return result
