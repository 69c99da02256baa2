"""Intervals of means: their coverage, Wilson's interval by hand, and intervals without values."""

import numpy as np
import pytest

from dfengine.evaluate.intervals import Interval, bootstrap_interval, proportion_interval


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.exponential(size=40).tolist()) for _ in range(100)]
    assert 0.86 <= np.mean([one.low <= 1 <= one.high for one in intervals]) <= 1
    assert bootstrap_interval([2.0, 2.0, float("nan")]) == Interval(2, 2, 2, 2)
    assert bootstrap_interval([]).count == 0
    assert np.isnan(bootstrap_interval([float("nan")]).mean)


def test_a_proportion_of_one_has_an_interval_too() -> None:
    """Wilson: 50 of 50 has the lower end 1 / (1 + 1.96² / 50); shares in between are bootstrapped."""
    all_of_50 = proportion_interval([1.0] * 50 + [float("nan")])
    assert (all_of_50.mean, all_of_50.high, all_of_50.count) == (1, 1, 50)
    assert all_of_50.low == pytest.approx(1 / (1 + 1.959964**2 / 50), rel=1e-5)
    assert proportion_interval([0.0, 0.0]).high > 0.5
    assert proportion_interval([0.5, 1.0, 1.0]) == bootstrap_interval([0.5, 1.0, 1.0])
    assert proportion_interval([]).count == 0


def test_intervals_are_formatted_like_numbers() -> None:
    assert str(Interval(0.5, 0.25, 0.75, 3)) == "0.50 [0.25, 0.75]"
    assert f"{Interval(0.5, 0.25, 0.75, 3):.1f}" == "0.5 [0.2, 0.8]"
    assert str(Interval(0.5, 0.5, 0.5, 1)) == "0.50"
    assert str(bootstrap_interval([])) == "–"
    assert Interval(2, 1, 3, 9).band == (2, 1, 3)
