"""Comparison of two reports: the differences that exceed chance.

Bytes and calls are exact: any difference is reported. A time is called better or worse only if it differs by more than
both MARGIN of the step and its noise. Noise is a two-sided bound of 1 - ALPHA on a difference between two runs:

    within a run    the spread of the log step times by the median absolute deviation (a hiccup of the machine is not
                    the program's), widened for steps that resemble the step before; Student's t with Welch's degrees
                    of freedom, as two short windows of unequal spread are compared
    between runs    of one configuration on one machine: placement of processes, memory and turbo clocks. Two short
                    windows cannot show it, so a floor is assumed (BETWEEN), more where steps vary more
    foreign load    on a shared machine: where `descheduled` shows that one run waited longer for its CPUs, changes in
                    waiting, transfers and the like that go the same way are not held against it

A regression moves all steps, a burst of foreign load some: the step time is called different only if its lower
quartile has moved too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from dist_gpt.report.analysis.statistics import FEWEST_STEPS, Steps, bound, student
from dist_gpt.report.render.elements import dict_of, list_of, listing, rows_of
from dist_gpt.report.units import amount, number, percent, seconds

MARGIN = 0.03
"""Share of the step time; less is never called a difference."""
BETWEEN = 0.02
"""Least standard deviation of the log step time between runs of one configuration."""
BETWEEN_OF_SPREAD, BETWEEN_OF_HELD = 0.25, 0.25
"""Factors for what replaces BETWEEN if larger: of the spread of a run's steps, and of the share of time in which it was
`descheduled`: with more processes than CPUs, the operating system decides how long a step takes."""
CATEGORY_BETWEEN = 0.04, 0.15
"""Relative standard deviation of a budget category between runs: for computing; for all that depends on others."""
BUSIER = 0.01
"""Share of the step; a smaller difference in `descheduled` says nothing."""
MEMORY_MARGIN = 0.05
OVERHEAD_BETWEEN = 0.3
"""Relative standard deviation between runs of the time outside training steps (start, evaluation)."""
COMPUTING = frozenset({"forward", "backward", "weight", "recompute", "optimizer"})
NAMES = frozenset({"name", "run_dir"})
"""Configuration keys that differ between any two runs."""


def compare(this: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the section of report `this` that compares it with an earlier one, `other`."""
    pair = _Pair(this, other)
    changes = config_changes(this, other)
    rows = [*_speed(pair, not changes), *_shares(pair), *_budget(pair), *_collectives(pair)]
    return {
        "other": {"name": other.get("name"), "run_dir": other.get("run_dir")},
        "rows": rows,
        "verdict": _verdict(pair, rows, changes),
        "config_changes": changes,
    }


def config_changes(this: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configuration keys whose values differ, except those in NAMES."""
    a, b = dict_of(this.get("config")), dict_of(other.get("config"))
    keys = sorted((a.keys() | b.keys()) - NAMES)
    return [{"key": key, "this": a.get(key), "other": b.get(key)} for key in keys if a.get(key) != b.get(key)]


class _Pair:
    """Two documents, this run's and the other's, and what the judgement of all rows has in common."""

    def __init__(self, this: dict[str, Any], other: dict[str, Any]) -> None:
        self.both = (this, other)
        self.heads = tuple(dict_of(document.get("headline")) for document in self.both)
        self.budgets = tuple(dict_of(document.get("budget_s")) for document in self.both)
        self.steps = tuple(Steps.of([amount(x) for x in list_of(head.get("step_s_samples"))]) for head in self.heads)

    def head(self, key: str) -> tuple[float | None, float | None]:
        return number(self.heads[0].get(key)), number(self.heads[1].get(key))

    @property
    def step_s(self) -> float:
        """Step time in seconds that shares refer to: the other run's, or this one's where that is not known."""
        this, other = self.head("step_s_p50")
        return other or this or 0.0

    @cached_property
    def noise(self) -> float | None:
        """Noise of the difference in log step time, without foreign load; None where there are too few steps."""
        first, second = self.steps
        if first is None or second is None:
            return None
        within = [(steps.error, steps.freedom) for steps in (first, second)]
        held = [amount(budget.get("descheduled")) / self.step_s if self.step_s else 0.0 for budget in self.budgets]
        between = [
            (max(BETWEEN, BETWEEN_OF_SPREAD * steps.spread, BETWEEN_OF_HELD * share), math.inf)
            for steps, share in zip((first, second), held, strict=True)
        ]
        return bound([*within, *between])

    def category_noise(self, category: str, between: float) -> float:
        """Return the noise of the difference in a category's seconds; `between` is a fraction of them."""
        errors = []
        for document, budget, steps in zip(self.both, self.budgets, self.steps, strict=True):
            if steps is not None:
                spread = amount(dict_of(document.get("budget_spread_s")).get(category))
                errors.append((spread * steps.inflation, steps.freedom))
                part = math.hypot(between, BETWEEN_OF_SPREAD * steps.spread)
                errors.append((part * amount(budget.get(category)), math.inf))
        return bound(errors)

    def moved(self, category: str) -> float:
        """Return the seconds by which a category is larger in this run."""
        return amount(self.budgets[0].get(category)) - amount(self.budgets[1].get(category))

    @cached_property
    def held(self) -> float:
        """Seconds by which a typical step of this run waited longer for its CPUs than one of the other run.

        Excludes hiccups of single steps: they add to the mean step time, not to the median.
        """
        typical = []
        for budget, head in zip(self.budgets, self.heads, strict=True):
            samples = [amount(x) for x in list_of(head.get("step_s_samples"))]
            hiccups = float(np.mean(samples) - np.median(samples)) if samples else 0.0
            typical.append(max(0.0, amount(budget.get("descheduled")) - max(0.0, hiccups)))
        return typical[0] - typical[1]

    @property
    def busier(self) -> int:
        """1 where foreign load delayed this run more than the other, -1 where less, 0 where about the same."""
        return 0 if abs(self.held) <= BUSIER * self.step_s else 1 if self.held > 0 else -1

    def load(self, category: str) -> float:
        """Return the seconds of a category's difference that foreign load may have caused.

        Shared caches slow down computing, by less than it waited for the CPU. While a rank waits for its CPU, all
        others may wait for that rank.
        """
        moved, held = self.moved(category), abs(self.held)
        if moved * self.busier <= 0:
            return 0.0
        if category in COMPUTING:
            own, whole = (
                min(sum(amount(budget.get(name)) for name in names) for budget in self.budgets)
                for names in ({category}, COMPUTING)
            )
            return min(abs(moved), held * own / whole) if whole > 0 else 0.0
        world = max(1.0, *(amount(dict_of(document.get("identity")).get("world")) for document in self.both))
        return min(abs(moved), held * world)

    def load_share(self, longer: float) -> float:
        """Return the share of the step that foreign load may explain, if the step's change `longer` goes its way."""
        if longer * self.busier <= 0:
            return 0.0
        categories = self.budgets[0].keys() | self.budgets[1].keys()
        return sum(self.load(category) for category in categories) / self.step_s if self.step_s > 0 else 0.0


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(
    what: str,
    unit: str,
    values: tuple[float | None, float | None],
    noise: float | None,
    margin: float,
    larger_is: str = "worse",
) -> dict[str, Any]:
    """Return the row of a difference in seconds, bytes or shares; `noise` and `margin` are in the same unit."""
    this, other = values
    verdict = "same"
    if this is not None and other is not None and noise is not None and abs(this - other) > max(noise, margin):
        verdict = larger_is if this > other else {"worse": "better", "better": "worse"}[larger_is]
    relative = this / other - 1 if this is not None and other else None
    noise = noise / abs(other) if noise is not None and other else None
    return {
        "what": what,
        "unit": unit,
        "this": this,
        "other": other,
        "change": relative,
        "noise": noise,
        "verdict": verdict,
    }


def _exact(what: str, unit: str, this: float, other: float) -> dict[str, Any]:
    """Return the row of a count, mean over ranks, of which any difference counts as changed."""
    row = _row(what, unit, (this, other), None, 0.0)
    row["noise"], row["verdict"] = 0.0, "same" if math.isclose(this, other, rel_tol=1e-9) else "changed"
    return row


def _speed(pair: _Pair, same_work: bool) -> Iterator[dict[str, Any]]:
    """Yield the rows of step time, tokens/s and MFU, all judged by the logs of the step times, so that they agree.

    With a changed configuration a step's work may differ, which then counts for the latter two.
    """
    first, second = pair.steps
    least = math.log1p(MARGIN)
    for what, key, unit, sense in (
        ("step time", "step_s_p50", "s", 1),
        ("tokens per second", "tokens_per_s", "tokens/s", -1),
        ("MFU", "mfu", "share", -1),
    ):
        this, other = pair.head(key)
        if this is None and other is None:
            continue
        row = _row(what, unit, (this, other), None, 0.0)
        if first and second and pair.noise is not None and this and other and min(this, other) > 0:
            shown = sense * math.log(this / other)  # larger: slower
            work = 0.0 if same_work or sense > 0 else first.median - second.median - shown
            slower = [first.median - second.median - work, first.fast - second.fast - work]
            limit = pair.noise + math.log1p(pair.load_share(slower[0]))
            row["noise"] = math.expm1(limit)
            if min(shown, *slower) > least and slower[0] > limit:
                row["verdict"] = "worse"
            elif max(shown, *slower) < -least and -slower[0] > limit:
                row["verdict"] = "better"
        yield row


def _shares(pair: _Pair) -> Iterator[dict[str, Any]]:
    """Yield the rows of goodput, bubble and memory peak."""
    this, other = pair.head("goodput")
    if this is not None and other is not None:
        overhead = math.hypot(this * (1 - this), other * (1 - other))
        noise = student(math.inf) * OVERHEAD_BETWEEN * overhead + max(pair.noise or 0.0, MARGIN) * (
            1 - min(this, other)
        )
        yield _row("goodput", "share", (this, other), noise, MARGIN, "better")
    bubbles = [
        number(dict_of(dict_of(document.get("pipeline")).get("bubble")).get("measured")) for document in pair.both
    ]
    if None not in bubbles and pair.step_s > 0 and pair.noise is not None:
        noise = (pair.category_noise("bubble", CATEGORY_BETWEEN[1]) + pair.load("bubble")) / pair.step_s
        if pair.busier:  # a share of steps that are longer for another reason
            noise += abs(amount(bubbles[0]) - amount(bubbles[1]))
        yield _row("bubble", "share", (bubbles[0], bubbles[1]), noise, MARGIN)
    peaks = tuple(_peak_bytes(document) for document in pair.both)
    if None not in peaks:
        yield _row("memory peak", "B", (peaks[0], peaks[1]), 0.0, MEMORY_MARGIN * amount(peaks[1]))


def _peak_bytes(document: dict[str, Any]) -> float | None:
    """Return the largest measured memory peak of any rank, in bytes; None where none was measured."""
    peaks = []
    for row in rows_of(document.get("memory_bytes")):
        allocated, measured = number(row.get("allocated_peak")), number(dict_of(row.get("measured")).get("peak"))
        peaks += [allocated if allocated is not None else measured]
    return max((peak for peak in peaks if peak is not None), default=None)


def _budget(pair: _Pair) -> Iterator[dict[str, Any]]:
    """Yield a row for every category of the step's budget, judged by its share of the step."""
    for category in [*pair.budgets[1], *(c for c in pair.budgets[0] if c not in pair.budgets[1])]:
        values = tuple(amount(budget.get(category)) for budget in pair.budgets)
        noise = None
        if not any(values):
            continue
        if pair.noise is not None and pair.step_s > 0:
            between = CATEGORY_BETWEEN[category not in COMPUTING]
            noise = pair.category_noise(category, between) + pair.load(category)
        yield _row(f"budget: {category}", "s", (values[0], values[1]), noise, MARGIN * pair.step_s)


@dataclass
class _Traffic:
    """Traffic of one axis in a step: seconds from last arrival to last end, variance of their mean, calls and bytes."""

    time_s: float = 0.0
    variance: float = 0.0
    calls: float = 0.0
    bytes: float = 0.0


def _traffic(document: dict[str, Any]) -> dict[str, _Traffic]:
    steps = max(1.0, amount(dict_of(document.get("identity")).get("steps_profiled")))
    axes: dict[str, _Traffic] = {}
    for row in rows_of(document.get("collectives")):
        axis, calls, middle = axes.setdefault(str(row.get("axis")), _Traffic()), amount(row.get("calls")), 0.0
        middle = amount(row.get("time_s_p50"))
        spread = max(0.0, amount(row.get("time_s_p95")) - middle) / NormalDist().inv_cdf(0.95)
        axis.time_s += calls * middle
        axis.variance += calls / steps * spread**2
        axis.calls += calls
        axis.bytes += amount(row.get("bytes_per_step"))
    return axes


def _collectives(pair: _Pair) -> Iterator[dict[str, Any]]:
    """Yield the rows of time, calls and bytes of every axis, per step."""
    this, other = (_traffic(document) for document in pair.both)
    for axis in sorted(this.keys() | other.keys()):
        a, b = this.get(axis, _Traffic()), other.get(axis, _Traffic())
        noise = None
        if pair.noise is not None and pair.step_s > 0:
            variance = a.variance + b.variance + (CATEGORY_BETWEEN[1] * math.hypot(a.time_s, b.time_s)) ** 2
            load = abs(a.time_s - b.time_s) if (a.time_s - b.time_s) * pair.busier > 0 else 0.0
            noise = student(math.inf) * math.sqrt(variance) + load
        yield _row(f"{axis} collectives: time", "s", (a.time_s, b.time_s), noise, MARGIN * pair.step_s)
        yield _exact(f"{axis} collectives: calls", "calls", a.calls, b.calls)
        yield _exact(f"{axis} collectives: bytes", "B", a.bytes, b.bytes)


# --- verdict ---------------------------------------------------------------------------------------------------------


def _verdict(pair: _Pair, rows: list[dict[str, Any]], changes: list[dict[str, Any]]) -> str:
    """Return the main findings of the comparison in a few sentences."""
    if pair.noise is None:
        return f"Too few profiled steps to compare times; at least {FEWEST_STEPS} are needed in both runs."
    by_name = {row["what"]: row for row in rows}
    step = by_name.get("step time")
    parts = []
    if step and step["change"] is not None:
        size, verdict = percent(abs(step["change"])), step["verdict"]
        noise = f"noise ±{percent(step['noise'])}"
        if verdict == "same":
            parts.append(f"No difference in step time beyond the noise ({step['change'] * 100:+.1f} %, {noise}).")
        else:
            word = "longer" if verdict == "worse" else "shorter"
            parts.append(f"Steps take {size} {word} ({seconds(step['other'])} → {seconds(step['this'])}, {noise}).")
    moved = [row for row in rows if row["verdict"] in ("worse", "better") and row["what"].startswith("budget: ")]
    moved.sort(key=lambda row: -abs(row["this"] - row["other"]))
    if moved:
        names = [f"{row['what'].removeprefix('budget: ')} ({_signed(row['this'] - row['other'])})" for row in moved]
        parts.append(f"Largest changes: {listing(names, 3)}.")
    if pair.busier:
        which = "this" if pair.busier > 0 else "the other"
        parts.append(f"The machine was busier during {which} run, so changes in waiting and transfer mean little.")
    changed = [row["what"] for row in rows if row["verdict"] == "changed"]
    if changed:
        parts.append(f"Changed: {listing(changed, 4)}.")
    if changes:
        keys = listing([change["key"] for change in changes], 3)
        parts.append(f"The configurations differ in {keys}.")
    return " ".join(parts) or "Nothing to compare: neither report has step times."


def _signed(difference: float) -> str:
    return f"{'+' if difference > 0 else '-'}{seconds(abs(difference))}"
