"""Results inside a Markdown page, so that it says what the file of a run says and nothing else.

A block stands between two marks, each a line of its own, and is made of the file that the first mark names::

    <!-- bench: protocol, latency.svg, steps of efficiency-h100.json -->
    …
    <!-- /bench -->

Its parts are tables (:data:`~mmmamba.benchmark.tables.TABLES`), plots (drawn beside the page), ``notes`` and
``machine``. With ``beyond OTHER.json`` behind the file, only those contexts are shown at which something did not fit
into the memory of the machine of that other file. With ``beside OTHER.json``, ``second-run`` is what that other run of
the same report differs by.

A figure in prose is followed by the place that it comes from, or by two whose ratio it is::

    takes 2.41 ms<!-- from efficiency-h100.json: linear.decode.103424.ms -->
    is 20.6 times<!-- from efficiency-h100.json: teacher.decode.103424.ms / linear.decode.103424.ms --> as fast

A place is SERIES.WHAT.CONTEXT.FIGURE, or SERIES.WHAT.VARIANT.CONTEXT.FIGURE. A figure in per cent is how much the first
differs from the second. Files are named as seen from the page. What stands in code is no figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from mmmamba.benchmark.cells import held, limit_ms
from mmmamba.benchmark.compare import comparison, differing
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.report import machine
from mmmamba.benchmark.results import Results, read
from mmmamba.benchmark.tables import TABLES, notes
from mmmamba.checkpoints.io import write_atomically
from mmmamba.errors import UserError
from mmmamba.report.markdown import text as as_text
from mmmamba.report.plot_style import render

OPEN, END, SECOND = "<!-- bench", "<!-- /bench -->", "second-run"
_BLOCK = re.compile(
    r"^<!-- bench: (?P<parts>[^<>\n]+?) of (?P<file>\S+)"
    r"(?: (?P<how>beyond|beside) (?P<other>\S+))? -->\n.*?^<!-- /bench -->$",
    re.MULTILINE | re.DOTALL,
)
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
    "limit": limit_ms,
    "GB": lambda _, m: held(m) / 1e9,
    "MB_of_state": lambda _, m: m.state_bytes / 1e6,
    "tokens_per_s": lambda _, m: m.tokens_per_s,
    "sequences": lambda _, m: m.batch,
}


def fill(page: Path) -> list[str]:
    """Make a page's blocks anew and draw their plots beside it; what its prose has wrong then (:func:`wrong_figures`).

    Raises:
        UserError: as :func:`filled`.
    """
    text = filled(page)
    for match in _BLOCK.finditer(text):
        for part in _parts(match):
            figure = draw(_results(page, match), part.removesuffix(".svg")) if part.endswith(".svg") else None
            if figure is not None:
                drawn = render(figure, "svg")
                write_atomically(_plot(page, match, part), lambda path, drawn=drawn: path.write_bytes(drawn))  # type: ignore[misc]
    write_atomically(page, lambda path: path.write_text(text, encoding="utf-8"))
    return wrong_figures(page)


def filled(page: Path) -> str:
    """The page as it should stand in the file.

    Raises:
        UserError: when there is no such page, and for a block that has no end, names something unknown, or is of a file
            that is not there; it names page and line.
    """
    text = _text(page)
    blocks = list(_BLOCK.finditer(text))
    opened = {_line(text, match.start()) for match in blocks}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.startswith(OPEN) and number not in opened:
            raise UserError(f"{page}:{number}: no whole block, from <!-- bench: PART, … of FILE.json --> to {END}")
    return _BLOCK.sub(lambda match: _made(page, text, match), text)


def wrong_figures(page: Path) -> list[str]:
    """A line for each figure in prose that is not what its place holds, rounded to the figure's digits.

    Raises:
        UserError: for a place or a file that is not there, and a place without a figure; it names page and line.
    """
    text = _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), _text(page))
    found = []
    for match in _FIGURE.finditer(text):
        where = f"{page}:{_line(text, match.start())}"
        if match["figure"] is None:
            raise UserError(f"{where}: no figure stands before '{match[0]}'")
        results = _read(page.parent / match["file"], where)
        values = [_value(results, place, where) for place in match["places"].split(" / ")]
        value = values[0] if len(values) == 1 else values[0] / values[1]
        if "%" in match["unit"] and len(values) == 2:
            value = 100 * abs(value - 1)
        figure, digits = match["figure"].replace(",", ""), len(match["figure"].partition(".")[2])
        if abs(float(figure) - value) > 0.5 * 10**-digits + 1e-9:
            told = f"{match['places']} in {match['file']} is {value:,.{digits}f}"
            found.append(f"{where}: says {match['figure']}, but {told}")
    return found


def beyond(results: Results, smaller: Results) -> Results:
    """What was measured behind those contexts at which something ran out of memory in ``smaller``, or was not asked."""
    held = set(smaller.contexts) - {point.task.context for point in smaller.points if point.oom}
    return replace(results, points=tuple(point for point in results.points if point.task.context not in held))


# ---------------------------------------------------------------------------------------------- one block, one place


def _made(page: Path, text: str, match: re.Match[str]) -> str:
    where = f"{page}:{_line(text, match.start())}"
    results = _results(page, match, where)
    device = results.environment["device"]
    lines = []
    for part in _parts(match):
        if part in TABLES:
            table = TABLES[part](results)
            lines.append(replace(table, title=f"{table.title} ({device})").markdown())
        elif part.removesuffix(".svg") in PLOTS and part.endswith(".svg"):
            plot = PLOTS[part.removesuffix(".svg")]
            lines.append(f"![{plot.caption} ({device})]({_plot(page, match, part).name})\n")
        elif part == "notes":
            lines.append("".join(f"- {as_text(note)}\n" for note in notes(results)))
        elif part == "machine":
            lines.append(machine(results))
        elif part == SECOND and match["how"] == "beside":
            lines.append(differing(comparison(results, _read(page.parent / match["other"], where))).markdown())
        else:
            known = [*TABLES, *(f"{name}.svg" for name in PLOTS), "notes", "machine", f"{SECOND} (beside OTHER.json)"]
            raise UserError(f"{where}: a report has no '{part}'; it has {', '.join(known)}")
    opened, closed = match[0].split("\n", 1)[0], match[0].rsplit("\n", 1)[-1]
    return "\n".join([opened, "", *lines, closed])


def _parts(match: re.Match[str]) -> list[str]:
    return [part.strip() for part in match["parts"].split(",")]


def _results(page: Path, match: re.Match[str], where: str = "") -> Results:
    results = _read(page.parent / match["file"], where)
    return beyond(results, _read(page.parent / match["other"], where)) if match["how"] == "beyond" else results


def _read(file: Path, where: str) -> Results:
    if not file.is_file():
        raise UserError(f"{where}: there is no {file}")
    return read(file)


def _plot(page: Path, match: re.Match[str], part: str) -> Path:
    return page.with_name(f"{Path(match['file']).stem}-{part}")


def _value(results: Results, place: str, where: str) -> float:
    match = _PLACE.fullmatch(place.strip())
    if match is None or match["figure"] not in FIGURES:
        known = ", ".join(FIGURES)
        raise UserError(f"{where}: '{place}' is no SERIES.WHAT[.VARIANT].CONTEXT.FIGURE; a figure is one of {known}")
    variant, context = match["variant"] or "", int(match["context"])
    measured = results.measured(match["series"], match["what"], context, variant)  # type: ignore[arg-type]
    if measured is None:
        raise UserError(f"{where}: nothing was measured at '{place}'")
    return FIGURES[match["figure"]](results, measured)


def _text(page: Path) -> str:
    if not page.is_file():
        raise UserError(f"{page}: {'is a folder, not a page' if page.is_dir() else 'no such file'}")
    return page.read_text(encoding="utf-8")


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
