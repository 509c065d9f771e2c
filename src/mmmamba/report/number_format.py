"""How numbers are written, in every table, page and progress line."""

from __future__ import annotations

import math
from typing import Any

EMPTY = "–"  # where there is no number


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with at least ``digits`` significant digits and thousands apart; :data:`EMPTY` for None and NaN.

    With three digits: 0.0123, 6.94, 143, 28,987, 2.50e+10.
    """
    if value is None or math.isnan(value):
        return EMPTY
    if abs(value) < 10 ** (digits - 1):
        return f"{value:.{digits}g}"
    return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits - 1}e}"


def shown(value: Any) -> str:
    """Any value of a table or a progress line: a float with four digits, an int with all of them, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(value, 4)


def times(ratio: float) -> str:
    """A ratio such as 0.94, 20.6 or 150, as exactly as claims are made about it."""
    return number(ratio) if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def change(ratio: float) -> str:
    """A ratio as a change in per cent: 0.242 is −75.8 %."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in per cent, without the sign; :data:`EMPTY` for None and NaN."""
    return EMPTY if share is None or math.isnan(share) else f"{100 * share:.{digits}f}"
