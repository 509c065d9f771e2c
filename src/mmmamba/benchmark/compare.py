"""Two runs of the same report, figure by figure: how far the second is from the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mmmamba.benchmark.results import Point, Results, absence
from mmmamba.benchmark.tables import title
from mmmamba.report.number_format import EMPTY, number
from mmmamba.report.table import Table

CLOSE = 0.05
#: The published styles launch operators one by one. They are as fast as the host, and hosts vary.
CLOSE_ON_THE_HOST = 0.20


def comparison(first: Results, second: Results) -> Table:
    """Every figure of either run, with the difference of the second in per cent; those that differ too much are marked.

    A point that has figures in only one of them is marked too.
    """
    host_bound = {one.label for one in (*first.series, *second.series) if one.published}
    places = list(dict.fromkeys(point.task for point in (*first.points, *second.points)))
    rows, count, off = [], 0, 0
    for task in places:
        ours, theirs = ({p.task: p for p in run.points}.get(task) for run in (first, second))
        name = title(Point(task=task))
        if ours is None or theirs is None or ours.measured is None or theirs.measured is None:
            alike = ours is not None and theirs is not None and _absence(ours) == _absence(theirs)
            rows.append([name, "", _absence(ours), _absence(theirs), "", "" if alike else "NOT THE SAME"])
            count, off = count + 1, off + (not alike)
            continue
        allowed = CLOSE_ON_THE_HOST if task.series in host_bound else CLOSE
        for (figure, a), (_, b) in zip(_figures(ours), _figures(theirs), strict=True):
            apart = b / a - 1 if a else None  # there is no ratio to zero
            far = a != b if apart is None else abs(apart) > allowed
            mark = f"over {100 * allowed:.0f} %" if far else ""
            rows.append([name, figure, number(a), number(b), EMPTY if apart is None else f"{100 * apart:+.1f}", mark])
            count, off = count + 1, off + far
    note = (
        f"{off} of {count} are marked. A figure is marked if the runs differ by more than {100 * CLOSE:.0f} %, or by "
        f"more than {100 * CLOSE_ON_THE_HOST:.0f} % where the teacher runs as published, which depends on the host. "
        f"First: {_where(first)}. Second: {_where(second)}."
    )
    columns = ["point", "figure", "first", "second", "difference, %", "marked"]
    return Table(title="Two runs", columns=columns, rows=rows, note=note)


def differing(table: Table) -> Table:
    """Only the marked rows of a comparison; the note still counts all of them."""
    return replace(table, rows=[row for row in table.rows if row[-1]])


def _figures(point: Point) -> Iterator[tuple[str, float]]:
    found, what = point.measured, point.task.what
    assert found is not None
    yield "ms", found.timing.ms
    if what == "batch":
        yield "sequences", found.batch
        yield "tokens/s", found.tokens_per_s
    yield "GB", found.held_bytes / 1e9


def _absence(point: Point | None) -> str:
    if point is None:
        return "not asked for"
    return "measured" if point.measured is not None else absence(point)


def _where(results: Results) -> str:
    return f"{results.environment['device']}, commit {results.environment.get('commit', 'unknown')}"
