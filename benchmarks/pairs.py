"""Measure two or more sides in alternating pairs or rounds, and summarise the ratios. Torch-free.

The order is reversed from pair to pair (AB BA AB ...), so that a machine that gets slower or faster meanwhile favours
neither side. The ratio is taken inside a pair, in which both sides ran under nearly the same conditions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

CONFIDENCE = 0.95
LEAST_S = 0.3
"""Shortest measurement: in shorter ones the noise of the scheduler dominates."""


@dataclass(frozen=True)
class Sample:
    """One measurement: the seconds of all its steps, and the loss of the last one."""

    seconds: float
    loss: float


class Side(Protocol):
    """One side of a comparison; the others are idle while it runs."""

    def run(self, steps: int) -> Sample:
        """Train `steps` steps and return the measurement."""


@dataclass(frozen=True)
class Pairs:
    """Seconds per step of both sides, pair by pair, and the largest relative difference of their losses."""

    ours: tuple[float, ...]
    plain: tuple[float, ...]
    steps: int
    loss_error: float

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ratio of our speed to the plain one's, pair by pair."""
        return tuple(plain / ours for ours, plain in zip(self.ours, self.plain, strict=True))


@dataclass(frozen=True)
class Summary:
    """Median, geometric mean, and one-sided lower 95 % bound of the geometric mean of ratios.

    The bound is by Student's t on the logarithms; it is 0 for a single pair, which allows none.
    """

    pairs: int
    median: float
    mean: float
    lower: float


def order(pairs: int) -> Iterator[tuple[bool, bool]]:
    """Yield the order of the sides for each pair; True is ours."""
    for pair in range(pairs):
        yield (True, False) if pair % 2 == 0 else (False, True)


def steps_per_sample(step_s: float, least_s: float = LEAST_S) -> int:
    """Return the number of steps that take at least `least_s` seconds."""
    return max(1, math.ceil(least_s / step_s)) if step_s > 0 else 1


def measure(
    ours: Side, plain: Side, pairs: int, warm_up: int, say: Callable[[int, float, float], None] = lambda *_: None
) -> Pairs:
    """Warm both sides up, then measure `pairs` pairs. `say(pair, ours, plain)` gets each, in seconds per step.

    Both sides take the same number of steps, so that they hold the same weights and their losses can be compared.
    """
    if pairs < 1 or warm_up < 1:
        raise ValueError(f"pairs is {pairs} and warm_up is {warm_up}; each must be at least 1")
    warm = [side.run(1) for _ in range(warm_up) for side in (ours, plain)]
    error = max(relative_error(a.loss, b.loss) for a, b in zip(warm[::2], warm[1::2], strict=True))
    steps = steps_per_sample(min(warm[-2].seconds, warm[-1].seconds))
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair, sequence in enumerate(order(pairs), start=1):
        sample = {mine: (ours if mine else plain).run(steps) for mine in sequence}
        for mine, found in sample.items():
            times[mine].append(found.seconds / steps)
        error = max(error, relative_error(sample[True].loss, sample[False].loss))
        say(pair, times[True][-1], times[False][-1])
    return Pairs(tuple(times[True]), tuple(times[False]), steps, error)


@dataclass(frozen=True)
class Rounds:
    """Seconds per step of every contender, round by round, and the largest relative error of the compared losses."""

    seconds: dict[str, tuple[float, ...]]
    steps: int
    loss_error: float

    def ratios(self, ours: str, other: str) -> tuple[float, ...]:
        """Return the ratio of the speed of `ours` to that of `other`, round by round."""
        return tuple(b / a for a, b in zip(self.seconds[ours], self.seconds[other], strict=True))


def measure_rounds(
    sides: Mapping[str, Side],
    pairs: int,
    warm_up: int,
    compared: Collection[str],
    say: Callable[[int, dict[str, float]], None] = lambda *_: None,
) -> Rounds:
    """Measure like `measure`, with any number of sides, in `pairs` rounds whose order is reversed each time.

    `loss_error` of the result compares the losses of the sides in `compared` with the first side's.
    """
    if pairs < 1 or warm_up < 1:
        raise ValueError(f"pairs is {pairs} and warm_up is {warm_up}; each must be at least 1")
    names, error = list(sides), 0.0
    times: dict[str, list[float]] = {name: [] for name in names}

    def turn(order: Sequence[str], steps: int) -> dict[str, Sample]:
        nonlocal error
        found = {name: sides[name].run(steps) for name in order}
        for name in compared:
            error = max(error, relative_error(found[name].loss, found[names[0]].loss))
        return found

    for _ in range(warm_up):
        warm = turn(names, 1)
    steps = steps_per_sample(min(sample.seconds for sample in warm.values()))
    for pair in range(pairs):
        for name, sample in turn(names if pair % 2 == 0 else names[::-1], steps).items():
            times[name].append(sample.seconds / steps)
        say(pair + 1, {name: found[-1] for name, found in times.items()})
    return Rounds({name: tuple(found) for name, found in times.items()}, steps, error)


def relative_error(got: float, want: float) -> float:
    """Return |got - want| / |want|, or |got - want| if `want` is 0; infinite if either is NaN."""
    error = abs(got - want) / abs(want) if want else abs(got - want)
    return math.inf if math.isnan(error) else error


def summarise(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Return the median, the geometric mean and its lower bound of `ratios`."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    lower = -math.inf
    if len(logs) > 1:
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        lower = mean - t_quantile(confidence, len(logs) - 1) * error
    return Summary(len(logs), statistics.median(ratios), math.exp(mean), math.exp(lower))


def t_two_sided(t: float, freedom: int) -> float:
    """Return P(|T| <= t) of Student's t with `freedom` degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4 (finite sums, exact for whole degrees of freedom).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if freedom == 1:
        total = 0.0
    for k in range(2 if odd else 1, freedom - 2, 2):
        term *= k / (k + 1) * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, freedom: int) -> float:
    """Return x with P(T <= x) = `probability` >= 1/2 of Student's t, by bisection; `freedom` as in `t_two_sided`."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"t_quantile({probability}, {freedom}): needs 0.5 <= probability < 1 and freedom >= 1")
    wanted = 2 * probability - 1
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) < wanted:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) < wanted else (low, middle)
    return high
