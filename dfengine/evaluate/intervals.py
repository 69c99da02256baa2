"""Confidence intervals of means over items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Resamples of a bootstrap.
NUM_RESAMPLES = 2000
#: With fewer items the bootstrap's intervals are too narrow (of 2 items they miss half of the means), and Student's t
#: takes its place.
MIN_BOOTSTRAP_ITEMS = 12
#: Values that differ by less than this share of the largest are equal: the bootstrap of rounding errors has no bounds.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean over items with its 95 % confidence interval. `format(interval, ".4f")` formats all three numbers."""

    mean: float
    low: float
    high: float
    count: int
    """number of items"""

    @property
    def band(self) -> tuple[float, float, float]:
        """(mean, low, high), as the figures take it."""
        return self.mean, self.low, self.high

    def __str__(self) -> str:
        return format(self, ".2f")

    def __format__(self, spec: str) -> str:
        if not self.count:
            return "–"
        mean, low, high = (format(value, spec or ".2f") for value in self.band)
        return f"{mean} [{low}, {high}]" if self.count > 1 else mean


#: What shares, areas and AUROC cannot leave, and what correlations cannot.
SHARES, CORRELATIONS = (0.0, 1.0), (-1.0, 1.0)


def mean_interval(values: Sequence[float], limits: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """The mean of the finite values with its interval, NaN if no value is finite.

    The bootstrap's, bias-corrected (BCa), or Student's t of fewer than `MIN_BOOTSTRAP_ITEMS` values, within the limits.
    The interval of a single value, or of values that are equal up to rounding, has no width.
    """
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if not len(finite):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(finite.mean())
    if np.ptp(finite) <= _ROUNDING * np.abs(finite).max():
        return Interval(mean, mean, mean, len(finite))
    if len(finite) < MIN_BOOTSTRAP_ITEMS:
        interval = stats.t.interval(0.95, len(finite) - 1, loc=mean, scale=stats.sem(finite))
        low, high = np.clip(interval, *limits).tolist()
        return Interval(mean, low, high, len(finite))
    rng = np.random.default_rng(0)
    bounds = stats.bootstrap((finite,), np.mean, n_resamples=NUM_RESAMPLES, rng=rng).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), len(finite))


def proportion_interval(values: Sequence[float]) -> Interval:
    """The mean of the finite values, each in [0, 1]: Wilson's interval if all are 0 or 1, otherwise `mean_interval`.

    Wilson's interval has a width even if all values are equal.
    """
    finite = [value for value in values if np.isfinite(value)]
    if not finite or not set(finite) <= {0.0, 1.0}:
        return mean_interval(finite, SHARES)
    bounds = stats.binomtest(int(sum(finite)), len(finite)).proportion_ci(method="wilson")
    return Interval(float(np.mean(finite)), float(bounds.low), float(bounds.high), len(finite))


def widening(count: int) -> float:
    """What a percentile bootstrap's interval of few items has to be multiplied with to be as wide as Student's t."""
    if not 1 < count < MIN_BOOTSTRAP_ITEMS:
        return 1.0
    return float(stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975) * (count / (count - 1)) ** 0.5)
