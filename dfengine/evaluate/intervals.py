"""Intervals of means over items, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over items and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    count: int
    """items"""

    def __str__(self) -> str:
        return format(self, ".2f")

    def __format__(self, form: str) -> str:
        """The mean and its interval, each formatted as a number is."""
        if not self.count:
            return "–"
        mean, low, high = (format(value, form or ".2f") for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if self.count > 1 else mean


def rate(values: Sequence[float]) -> Interval:
    """`interval` of shares in [0, 1]; of ones and zeros alone Wilson's, which is wide of none and of all, too."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite or not set(finite) <= {0.0, 1.0}:
        return interval(finite)
    found = stats.binomtest(int(sum(finite)), len(finite)).proportion_ci(method="wilson")
    return Interval(float(np.mean(finite)), float(found.low), float(found.high), len(finite))


def interval(values: Sequence[float]) -> Interval:
    """The mean of the finite values with its 95 % bootstrap interval (bias-corrected); NaN where there are none.

    One item, or items that are all the same, leave an interval of no width.
    """
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if not len(finite):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(finite.mean())
    if np.ptp(finite) == 0:
        return Interval(mean, mean, mean, len(finite))
    found = stats.bootstrap((finite,), np.mean, n_resamples=2000, rng=np.random.default_rng(0)).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(finite))
