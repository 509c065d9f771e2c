"""The greatest number that fits is found, wherever the search begins, in few tries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmmamba.benchmark.measure import PRECISION, greatest


@given(st.integers(0, 10_000), st.integers(-5, 20_000), st.integers(1, 12_000))
def test_found_up_to_a_sixteenth(truth: int, guess: int, most: int):
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= truth

    found = greatest(fits, guess=guess, most=most)
    best = min(truth, most)
    assert found <= best
    assert best - found <= max(0, found // PRECISION)
    assert all(1 <= number <= most for number in tried)
    assert len(tried) == len(set(tried)) <= 22


def test_a_guess_that_is_nearly_right_takes_a_try_or_two():
    for truth, most, tries in ((1000, 1000, 1), (960, 1000, 1), (940, 1000, 3), (1000, 5000, 2)):
        tried: list[int] = []

        def fits(number: int, truth: int = truth, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number <= truth

        greatest(fits, guess=950, most=most)
        assert len(tried) <= tries, (truth, most, tried)
