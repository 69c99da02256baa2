"""Intervals of means: their coverage, Wilson's interval by hand, and intervals without values."""

import numpy as np
import pytest

from dfengine.evaluate.intervals import Interval, mean_interval, proportion_interval, widening


def test_mean_intervals_cover_the_mean_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.exponential(size=40).tolist()) for _ in range(100)]
    assert 0.86 <= np.mean([one.low <= 1 <= one.high for one in intervals]) <= 1
    assert mean_interval([2.0, 2.0, float("nan")]) == Interval(2, 2, 2, 2)
    assert mean_interval([1.0] * 20 + [1 - 2e-16]).band == pytest.approx((1, 1, 1)), "equal but for rounding"
    assert mean_interval([]).count == 0
    assert np.isnan(mean_interval([float("nan")]).mean)


@pytest.mark.parametrize("n", [2, 3, 6, 11])
def test_intervals_of_few_items_cover_the_mean_as_often(n: int) -> None:
    """Student's t, which is exact for normal values; the bootstrap's would miss half of the means at n = 2."""
    values = np.random.default_rng(0).normal(size=(1000, n))
    intervals = [mean_interval(row.tolist()) for row in values]
    assert np.mean([one.low <= 0 <= one.high for one in intervals]) == pytest.approx(0.95, abs=0.025)


def test_a_percentile_bootstrap_of_few_items_is_widened_to_students_t() -> None:
    values = np.random.default_rng(0).normal(size=6)
    samples = np.random.default_rng(1).choice(values, (20000, 6)).mean(1)
    low, high = np.percentile(samples, [2.5, 97.5])
    exact = mean_interval(values.tolist())
    assert widening(6) * (high - low) == pytest.approx(exact.high - exact.low, rel=0.03)
    assert widening(1) == widening(12) == 1


def test_a_proportion_of_one_has_an_interval_too() -> None:
    """Wilson: 50 of 50 has the lower end 1 / (1 + 1.96² / 50); shares in between are bootstrapped."""
    all_of_50 = proportion_interval([1.0] * 50 + [float("nan")])
    assert (all_of_50.mean, all_of_50.high, all_of_50.count) == (1, 1, 50)
    assert all_of_50.low == pytest.approx(1 / (1 + 1.959964**2 / 50), rel=1e-5)
    assert proportion_interval([0.0, 0.0]).high > 0.5
    shares = [0.5, 1.0, 1.0] * 4
    assert proportion_interval(shares) == mean_interval(shares)
    assert proportion_interval([0.9, 1.0]).high == 1 < mean_interval([0.9, 1.0]).high
    assert proportion_interval([]).count == 0


def test_an_interval_stays_within_its_limits() -> None:
    assert mean_interval([0.25, 0.5, 0.75], (0.1, 0.8)) == Interval(0.5, 0.1, 0.8, 3)


def test_intervals_are_formatted_like_numbers() -> None:
    assert str(Interval(0.5, 0.25, 0.75, 3)) == "0.50 [0.25, 0.75]"
    assert f"{Interval(0.5, 0.25, 0.75, 3):.1f}" == "0.5 [0.2, 0.8]"
    assert str(Interval(0.5, 0.5, 0.5, 1)) == "0.50"
    assert str(mean_interval([])) == "–"
    assert Interval(2, 1, 3, 9).band == (2, 1, 3)
