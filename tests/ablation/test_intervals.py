"""Student's t: its quantiles are right, its intervals cover, pairs are paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmmamba.ablation.intervals import difference, t_interval, t_quantile, verdict
from mmmamba.evaluation.statistics import Interval


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 10, 20, 30, 31, 60, 200])
def test_quantiles_cut_off_what_they_say(degrees: int) -> None:
    """The density of t, integrated from 0 to the quantile, gives 0.475."""
    x = np.linspace(0, t_quantile(degrees), 200_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    inside = float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())
    assert inside == pytest.approx(0.475, abs=2e-5)


def test_an_interval_by_hand() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    half = 4.3027 * 1.0 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_one_value_leaves_everything_open_and_equal_ones_nothing() -> None:
    assert t_interval([0.7]) == Interval(0.7, -math.inf, math.inf)
    assert t_interval([0.7, 0.7, 0.7]) == Interval(pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.7))


def test_intervals_of_three_hold_the_mean_19_times_in_20() -> None:
    drawn = np.random.default_rng(0).normal(5.0, 2.0, size=(4000, 3))
    held = [found.low <= 5.0 <= found.high for found in map(t_interval, drawn.tolist())]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.012)


def test_differences_are_paired_over_the_seeds_that_both_have() -> None:
    ours, theirs = {0: 10.0, 1: 20.0, 2: 33.0, 7: 0.0}, {0: 9.0, 1: 18.0, 2: 30.0, 3: 50.0}
    found = difference(ours, theirs)
    assert found is not None
    expected = t_interval([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (Interval(2, 1, 3), "confirmed"),
        (Interval(-2, -3, -1), "contradicted"),
        (Interval(1, 0, 2), "undecided"),
        (Interval(1, -1, 3), "undecided"),
        (Interval(9, -math.inf, math.inf), "undecided (one seed)"),
        (None, "not measured"),
    ],
)
def test_verdicts(interval: Interval | None, said: str) -> None:
    assert verdict(interval) == said
