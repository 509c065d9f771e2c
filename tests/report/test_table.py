"""Tables and numbers look alike wherever they are shown."""

from __future__ import annotations

import math

import pytest

from mmmamba.report.number_format import EMPTY, change, number, percent, shown, times
from mmmamba.report.table import Table, table_of


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (6.94, "6.94"), (99.97, "100"), (142.65, "143"), (28_987.3, "28,987"), (2.5e10, "2.50e+10"),
     (-1234.5, "-1,234"), (math.inf, "inf"), (math.nan, EMPTY), (None, EMPTY)],
)  # fmt: skip
def test_a_number_has_three_digits_at_least(value: float | None, text: str) -> None:
    assert number(value) == text


def test_values_ratios_and_shares() -> None:
    assert [shown(v) for v in (12_345, 0.123456, 1234.5, "a", True, None)] == [
        "12,345", "0.1235", "1,234", "a", "True", "",
    ]  # fmt: skip
    assert [times(ratio) for ratio in (0.944, 9.99, 20.61, 150.4)] == ["0.94", "9.99", "20.6", "150"]
    assert [change(ratio) for ratio in (0.242, 1.5)] == ["−75.8 %", "+50.0 %"]
    assert [percent(share) for share in (0.5, 1, math.nan, None)] == ["50.0", "100.0", EMPTY, EMPTY]


def test_numbers_are_aligned_to_the_right_and_small_print_follows_its_cell() -> None:
    values = table_of("t", ("name", "n", "words"), [("a", 1000, "x"), ("b", None, 2)])
    assert values.markdown(level=2).splitlines() == [
        "## t", "", "| name | n | words |", "|---|---:|---|", "| a | 1,000 | x |", "| b |  | 2 |",
    ]  # fmt: skip
    texts = Table(title="t", columns=["model", "score"], rows=[["a", "50"]], details=[["", "[40, 60]"]], note="Of 9.")
    assert texts.markdown().splitlines() == [
        "### t", "", "Of 9.", "", "| model | score |", "|---|---:|", "| a | 50 [40, 60] |",
    ]  # fmt: skip
