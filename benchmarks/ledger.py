"""`ledger`: measure the cost of recording in the demo. The same processes train with and without it, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from benchmarks.pairs import Sample, measure, summarise
from benchmarks.processes import Team
from benchmarks.result import Result, Row
from benchmarks.settings import Settings
from dist_gpt.config.load import load
from dist_gpt.plan.count import count_comm
from dist_gpt.plan.steps import RankPlan

NAME = "ledger"
PAIRS = 60
ISOLATED, ALWAYS, WINDOW = 0.01, 0.04, 0.05
"""Targets, as fractions of the step time."""


class Mode:
    """A team that records in one mode: on, off or window."""

    def __init__(self, team: Team, mode: str) -> None:
        self.team, self.mode = team, mode

    def run(self, steps: int) -> Sample:
        """Train `steps` steps in the mode and return the measurement."""
        return self.team.run(steps, self.mode)


def run(settings: Settings, say: Callable[[str], None]) -> Result:
    """Compare the ledger as always on with none, then the profiling window open with it closed."""
    config = load("demo", [*settings.overrides, "data.source=synthetic", "model.vocab_size=256"])
    what = f"the demo's step, {config.world_size} ranks, with recording and without"
    result = Result(NAME, what, settings.document())
    with Team("ours", config, settings.threads or 1) as team:
        sides = (("on", "off", "always on", ALWAYS), ("window", "on", "profiling window open", WINDOW))
        for mode, without, what, target in sides:
            tell = partial(_tell, say, mode)
            found = measure(Mode(team, mode), Mode(team, without), settings.pairs or PAIRS, settings.warm_up, tell)
            summary = summarise(found.ratios)
            result.rows += [
                Row(f"{what}: overhead, median of {summary.pairs} pairs", 1 / summary.median - 1),
                Row(f"{what}: overhead, upper 95 % bound of the mean (t)", 1 / summary.lower - 1, "", target, False),
            ]
            result.raw[mode] = {"recorded_s": found.ours, "without_s": found.plain}
            step_s = statistics.median(found.plain)
    each = record_s()
    calls = max(_calls(RankPlan(config, rank)) for rank in range(config.world_size))
    result.rows += [
        Row("one record in isolation", 1e6 * each, "us"),
        Row("records of a step, busiest rank", calls),
        Row("records x cost, share of the step", each * calls / step_s, "", ISOLATED, False),
    ]
    return result


def _tell(say: Callable[[str], None], mode: str, pair: int, with_s: float, without_s: float) -> None:
    say(f"{mode}, pair {pair}: {1e3 * with_s:.0f} and {1e3 * without_s:.0f} ms a step")


def record_s() -> float:
    """Return the seconds of one record in isolation, the fastest of several tries."""
    from dist_gpt.profile.recorder import record_cost_ns

    return min(record_cost_ns() for _ in range(5)) / 1e9


def _calls(plan: RankPlan) -> int:
    return sum(tally.calls for tally in count_comm(plan, plan.steps).tallies.values())
