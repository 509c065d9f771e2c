"""What stands in the cells of a report's tables: a number, a ratio, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator

from mmmamba.benchmark.limits import Cost
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.results import Point, Results, What
from mmmamba.benchmark.subjects import Series
from mmmamba.report.number_format import EMPTY

FULL = "out of memory"
SKIPPED = "skipped"


def number(value: float) -> str:
    """Three significant digits at least, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """How many times one is the other, as exactly as the claims about it are made."""
    return number(ratio) if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def change(ratio: float) -> str:
    """By how many per cent a value differs from another, given their ratio."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def absent(point: Point | None) -> str:
    """Why a cell holds no number."""
    return EMPTY if point is None else FULL if point.oom else SKIPPED


def held(measured: Measured) -> int:
    """The memory to compare: the peak, or what lies there between steps where no peak is counted."""
    return measured.resident_bytes if measured.peak_bytes is None else measured.peak_bytes


def limit_ms(results: Results, found: Measured) -> float:
    """The least that the machine could take."""
    return results.rates.ms(Cost(bytes=found.bytes, flops=found.flops))


def measured_points(results: Results, what: What) -> Iterator[tuple[Series, Point, Measured]]:
    """The points of a kind that have figures, series by series."""
    for one in results.series:
        for point in results.points:
            if point.task.series == one.label and point.task.what == what and point.measured is not None:
                yield one, point, point.measured
