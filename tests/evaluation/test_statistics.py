"""Intervals and ratios: known values, and what must hold for any scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.evaluation import aggregate, report, statistics, tables
from mmmamba.evaluation.predict import Cost
from mmmamba.report.number_format import EMPTY, number, percent

RIGHT_WRONG = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30)
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_known_values(correct: int, n: int, low: float, high: float) -> None:
    interval = statistics.wilson(correct, n)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_value_and_shrinks(case: tuple[int, int]) -> None:
    correct, n = case
    interval = statistics.wilson(correct, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    more = statistics.wilson(10 * correct, 10 * n)
    assert more.high - more.low < interval.high - interval.low


def test_wilson_of_nothing_knows_nothing() -> None:
    interval = statistics.wilson(0, 0)
    assert math.isnan(interval.value)
    assert (interval.low, interval.high) == (0, 1)


def test_soft_scores_get_a_bootstrap_interval() -> None:
    interval = statistics.proportion([0.3, 0.6, 0.9, 1.0] * 25)
    assert interval.value == pytest.approx(0.7)
    assert 0.6 < interval.low < 0.7 < interval.high < 0.8


@settings(max_examples=25, deadline=None)
@given(PAIRS, st.integers(0, 5))
def test_retention_is_bounded_paired_and_repeatable(pairs: list[tuple[float, float]], seed: int) -> None:
    student, teacher = zip(*pairs, strict=True)
    found = statistics.retention(student, teacher, seed)
    if sum(teacher) == 0:
        assert found is None
        return
    assert found is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(min(sum(student) / sum(teacher), 1))
    assert found == statistics.retention(student, teacher, seed)
    same = statistics.retention(teacher, teacher, seed)
    assert same is not None
    assert (same.value, same.low) == (1, 1)  # the same answers: no doubt, because the draws are paired


def test_retention_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        teacher = (random.random(150) < 0.9).astype(float)
        student = teacher * (random.random(150) < 0.8)  # keeps 80 % of what the teacher knows
        found = statistics.retention(student, teacher, seed=trial)
        assert found is not None
        inside += found.low <= 0.8 <= found.high
    assert 0.90 <= inside / 200 <= 0.99


def test_mean_retention_counts_abilities_alike_and_caps_each() -> None:
    better = ([1.0] * 10, [1.0] * 5 + [0.0] * 5)  # 200 %, counts as 100 %
    worse = ([1.0] * 25 + [0.0] * 75, [1.0] * 50 + [0.0] * 50)  # 50 %
    hopeless = ([1.0] * 3, [0.0] * 3)  # the teacher knows nothing: left out
    found = statistics.mean_retention([better, worse, hopeless])
    assert found is not None
    assert found.value == pytest.approx(0.75)
    assert found.low < 0.75 < found.high
    assert statistics.mean_retention([hopeless]) is None


@given(st.lists(RIGHT_WRONG, min_size=1, max_size=4))
def test_mean_of_abilities_holds_its_value(groups: list[list[float]]) -> None:
    found = statistics.mean_of([statistics.proportion(group) for group in groups])
    assert found.value == pytest.approx(np.mean([np.mean(group) for group in groups]))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_mean_of_abilities_adds_doubts_in_squares() -> None:
    part = statistics.wilson(8, 10)
    found = statistics.mean_of([part] * 4)
    assert found.high - found.value == pytest.approx((part.high - part.value) / 2)
    assert statistics.mean_of([statistics.wilson(10, 10)] * 2).low < 0.9


@pytest.mark.parametrize(
    ("student", "teacher", "chance", "kept"),
    [(0.75, 1.0, 0.5, 0.5), (0.4, 1.0, 0.5, 0.0), (1.0, 0.9, 0.5, 1.0), (0.9, 0.5, 0.5, None), (0.2, 0.4, 0.5, None)],
)
def test_chance_corrected(student: float, teacher: float, chance: float, kept: float | None) -> None:
    assert statistics.chance_corrected(student, teacher, chance) == kept


def test_large_sets_are_resampled_in_pieces() -> None:
    found = statistics.retention([1.0, 0.0] * 20_000, [1.0, 1.0] * 20_000)
    assert found is not None
    assert found.value == 0.5
    assert 0.009 < found.high - found.low < 0.011  # 2 × 1.96 × 0.5 / √40,000


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in number"):
        statistics.retention([1.0], [1.0, 0.0])


def test_what_is_made_of_nothing_is_shown_as_nothing() -> None:
    nothing = statistics.wilson(0, 0)
    assert percent(tables._value(nothing)) == EMPTY == number(math.nan) == number(None)
    assert tables._range(nothing) == "" and tables._value(nothing) is None
    assert report._interval_data("accuracy", nothing) == {"accuracy": None, "accuracy_interval": [0.0, 1.0]}
    assert number(Cost().tokens_per_second) == EMPTY
    assert math.isnan(aggregate._exp(math.nan))
