"""Robust statistics of step times, for short windows in which steps resemble their neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ALPHA = 0.005
"""Two-sided probability that a difference due to chance exceeds its bound."""
FEWEST_STEPS = 6


@dataclass(frozen=True)
class Steps:
    """Log step times of a window: median, lower quartile, standard error of the median and its degrees of freedom.

    `inflation` is the factor by which a standard error exceeds that of independent steps.
    """

    median: float
    fast: float
    error: float
    freedom: float
    spread: float
    inflation: float

    @classmethod
    def of(cls, samples: list[float]) -> Steps | None:
        """Return the statistics of step times in seconds, or None for fewer than FEWEST_STEPS positive ones."""
        times = [x for x in samples if x > 0]
        if len(times) < FEWEST_STEPS:
            return None
        logs = np.log(times)
        n, median = len(logs), float(np.median(logs))
        # The median absolute deviation, scaled to a normal's standard deviation. For few steps it may vanish by chance;
        # half of the standard deviation does not.
        spread = max(1.4826 * float(np.median(np.abs(logs - median))), 0.5 * float(np.std(logs, ddof=1)))
        correlation = _correlation(logs, median, spread)
        inflation = math.sqrt((1 + correlation) / (1 - correlation))
        error = math.sqrt(math.pi / 2) * spread * inflation / math.sqrt(n)
        # The spread is as uncertain as a standard deviation from 0.37 times as many values.
        freedom = max(2.0, 0.37 * (n / inflation**2 - 1))
        return cls(median, float(np.quantile(logs, 0.25)), error, freedom, spread, inflation)


def _correlation(logs: np.ndarray, median: float, spread: float) -> float:
    """Return the correlation of neighbouring steps, in [0, 0.8], outliers clipped and short-series bias removed."""
    if spread == 0:
        return 0.0
    deviations = np.clip(logs - median, -2.5 * spread, 2.5 * spread)
    deviations = deviations - deviations.mean()
    raw = float((deviations[1:] * deviations[:-1]).sum() / (deviations**2).sum())
    return min(max(raw + (1 + 3 * raw) / len(logs), 0.0), 0.8)


def student(freedom: float) -> float:
    """Return the 1 - ALPHA/2 quantile of Student's t (Hill's expansion: 17 % too small for `freedom` 2, 5 % for 3)."""
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def bound(errors: list[tuple[float, float]]) -> float:
    """Return the bound of a difference from its parts' (standard error, degrees of freedom), by Welch-Satterthwaite."""
    variance = sum(error**2 for error, _ in errors)
    if variance == 0:
        return 0.0
    freedom = variance**2 / max(sum(error**4 / freedom for error, freedom in errors), 1e-300)
    return student(freedom) * math.sqrt(variance)
