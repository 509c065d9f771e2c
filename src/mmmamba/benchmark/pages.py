"""Markdown pages that say what the results of a benchmark say: blocks made of them, and figures in prose checked.

A block (see :mod:`mmmamba.report.blocks`) names parts of a report and the file of its results::

    <!-- bench: protocol, latency.svg, steps of efficiency-h100.json -->
    …
    <!-- /bench -->

Its parts are tables (:data:`~mmmamba.benchmark.tables.TABLES`), plots (drawn beside the page), ``notes`` and
``machine``. With ``beyond OTHER.json`` after the file, only those contexts are shown at which something did not fit
into the memory of the machine of that other file. With ``beside OTHER.json``, the part ``second-run`` shows how that
other run of the same report differs.

A figure in prose is followed by the place that it comes from, or by two places whose ratio it is::

    takes 2.41 ms<!-- from efficiency-h100.json: linear.decode.103424.ms -->
    is 20.6 times<!-- from efficiency-h100.json: teacher.decode.103424.ms / linear.decode.103424.ms --> as fast

A place is SERIES.WHAT.CONTEXT.FIGURE, or SERIES.WHAT.VARIANT.CONTEXT.FIGURE. A figure in per cent is how much the first
differs from the second. Files are named as seen from the page. Numbers inside code spans and fences are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mmmamba.benchmark.compare import comparison, differing
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.report import machine
from mmmamba.benchmark.results import Results, read
from mmmamba.benchmark.tables import TABLES, notes
from mmmamba.checkpoints.io import write_atomically
from mmmamba.errors import UserError
from mmmamba.report.blocks import Block, beside, fill_blocks, find_blocks, read_page
from mmmamba.report.markdown import text as as_text
from mmmamba.report.plot_style import render

VERB, FORM = "bench", "PART, … of FILE.json"
SECOND = "second-run"
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_FIGURE = re.compile(
    r"(?:(?P<figure>\d[\d,]*(?:\.\d+)?)(?P<unit>[^\d<\n]{0,16}))?<!-- from (?P<file>\S+): (?P<places>.+?) -->"
)
_PLACE = re.compile(
    r"(?P<series>.+)\.(?P<what>decode|prefill|batch)(?:\.(?P<variant>[a-z]\w*))?\.(?P<context>\d+)\.(?P<figure>\w+)"
)

#: What a place may end in.
FIGURES: Mapping[str, Callable[[Results, Measured], float]] = {
    "ms": lambda _, m: m.timing.ms,
    "s": lambda _, m: m.timing.ms / 1e3,
    "p99": lambda _, m: m.timing.p99,
    "cold": lambda _, m: m.timing.cold,
    "limit": lambda results, m: results.limit_ms(m),
    "GB": lambda _, m: m.held_bytes / 1e9,
    "MB_of_state": lambda _, m: m.state_bytes / 1e6,
    "tokens_per_s": lambda _, m: m.tokens_per_s,
    "sequences": lambda _, m: m.batch,
}


def fill(page: Path) -> list[str]:
    """Fill a page's blocks again and draw their plots beside it; return what is wrong in its prose then.

    Raises:
        UserError: as :func:`filled` and :func:`wrong_figures`.
    """
    text = filled(page)
    for block in find_blocks(page, VERB, FORM):
        for part in block.parts:
            figure = draw(_results(block), part.removesuffix(".svg")) if part.endswith(".svg") else None
            if figure is not None:
                drawn = render(figure, "svg")
                write_atomically(_plot(block, part), lambda path, drawn=drawn: path.write_bytes(drawn))  # type: ignore[misc]
    write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"))
    return wrong_figures(page)


def filled(page: Path) -> str:
    """The page as it should be in the file.

    Raises:
        UserError: when there is no such page, and for a block that has no end, names something unknown, or is of a file
            that is not there; it names page and line.
    """
    return fill_blocks(page, VERB, FORM, _content)


def wrong_figures(page: Path) -> list[str]:
    """A line for each figure in prose that is not what its place holds, rounded to the figure's digits.

    Raises:
        UserError: for a place or a file that is not there, and a place without a figure; it names page and line.
    """
    text = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), read_page(page))
    found = []
    for match in _FIGURE.finditer(text):
        where = f"{page}:{text.count(chr(10), 0, match.start()) + 1}"
        try:
            wrong = _wrong(page, match)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if wrong:
            found.append(f"{where}: {wrong}")
    return found


def beyond(results: Results, smaller: Results) -> Results:
    """Only the contexts at which something ran out of memory in ``smaller``, or that were not asked for there."""
    fitting = set(smaller.contexts) - {point.task.context for point in smaller.points if point.oom}
    return replace(results, points=tuple(point for point in results.points if point.task.context not in fitting))


# ---------------------------------------------------------------------------------------------- one block


def _content(block: Block) -> str:
    results = _results(block)
    return "\n".join(_part(block, part, results) for part in block.parts)


def _part(block: Block, part: str, results: Results) -> str:
    device, plot = results.environment["device"], part.removesuffix(".svg")
    if part in TABLES:
        table = TABLES[part](results)
        return replace(table, title=f"{table.title} ({device})").markdown()
    if plot in PLOTS and part.endswith(".svg"):
        return f"![{PLOTS[plot].caption} ({device})]({_plot(block, part).name})\n"
    if part == "notes":
        return "".join(f"- {as_text(note)}\n" for note in notes(results))
    if part == "machine":
        return machine(results)
    if part == SECOND and block.how == "beside":
        return differing(comparison(results, read(block.path(block.other)))).markdown()
    known = [*TABLES, *(f"{name}.svg" for name in PLOTS), "notes", "machine", f"{SECOND} (beside OTHER.json)"]
    raise UserError(f"a report has no '{part}'; it has {', '.join(known)}")


def _results(block: Block) -> Results:
    results = read(block.path(block.file))
    return beyond(results, read(block.path(block.other))) if block.how == "beyond" else results


def _plot(block: Block, part: str) -> Path:
    return block.page.with_name(f"{Path(block.file).stem}-{part}")


# ---------------------------------------------------------------------------------------------- one figure


def _wrong(page: Path, match: re.Match[str]) -> str:
    """What a figure says and its place says instead; '' where they agree."""
    if match["figure"] is None:
        raise UserError(f"no figure comes before '{match[0]}'")
    results = read(beside(page, match["file"]))
    values = [_value(results, place) for place in match["places"].split(" / ")]
    value = values[0] if len(values) == 1 else values[0] / values[1]
    if "%" in match["unit"] and len(values) == 2:
        value = 100 * abs(value - 1)
    figure, digits = match["figure"].replace(",", ""), len(match["figure"].partition(".")[2])
    if abs(float(figure) - value) <= 0.5 * 10**-digits + 1e-9:
        return ""
    return f"says {match['figure']}, but {match['places']} in {match['file']} is {value:,.{digits}f}"


def _value(results: Results, place: str) -> float:
    match = _PLACE.fullmatch(place.strip())
    if match is None or match["figure"] not in FIGURES:
        known = ", ".join(FIGURES)
        raise UserError(f"'{place}' is no SERIES.WHAT[.VARIANT].CONTEXT.FIGURE; a figure is one of {known}")
    variant, context = match["variant"] or "", int(match["context"])
    measured = results.measured(match["series"], match["what"], context, variant)  # type: ignore[arg-type]
    if measured is None:
        raise UserError(f"nothing was measured at '{place}'")
    return FIGURES[match["figure"]](results, measured)
