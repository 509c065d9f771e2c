"""A report as tables (for Markdown, HTML and the terminal) and as plain data (for JSON)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from mmmamba import markdown
from mmmamba.errors import printable
from mmmamba.evaluation.results import AbilityResult, ModelResult, Report
from mmmamba.evaluation.statistics import Interval
from mmmamba.progress import CELL, Terminal

METRIC_TITLES = {
    "exact": "Exact match",
    "yes_no": "Accuracy of yes/no answers (POPE's rule)",
    "choice": "Accuracy of choices",
    "mme": "Accuracy per question (MME's rule)",
    "vqa": "VQA accuracy (TextVQA/GQA's rule)",
}
EMPTY = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under column names.

    Attributes:
        shades: per row and column how good a cell is, 0 … 1, or None for a cell that is not coloured.
        details: per row and column small print that belongs to a cell, such as its interval.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float | None]] = field(default=())
    details: Sequence[Sequence[str]] = field(default=())

    def markdown(self) -> str:
        """The table under a heading; a cell's small print follows it in the same cell."""
        lines = [f"### {markdown.text(self.title)}", ""]
        if self.note:
            lines += [self.note, ""]
        lines.append("| " + " | ".join(markdown.text(column) for column in self.columns) + " |")
        lines.append("|" + "---|" + "---:|" * (len(self.columns) - 1))
        for i, row in enumerate(self.rows):
            details = self.details[i] if self.details else [""] * len(row)
            both = zip(row, details, strict=True)
            cells = [f"{markdown.text(cell)} {markdown.text(detail)}".rstrip() for cell, detail in both]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def tables(report: Report) -> list[Table]:
    """Everything a report says, most wanted first."""
    title = METRIC_TITLES[report.metric]
    found = [
        _by_ability(
            report,
            report.models,
            f"{title}, %",
            "Greedy answers, with 95 % intervals; the mean counts every ability alike. 'blind': the same questions "
            "with the pictures blanked, which shows what guessing gives.",
            lambda r: r.score,
        )
    ]
    students = [model for model in report.models if model.against]
    if students:
        note = "student / teacher, capped at 100 % per ability; mean over abilities; 95 % paired bootstrap intervals."
        found.append(_by_ability(report, students, "Retention, %", note, lambda r: r.retention, against=True))
        if any(r.retention_over_chance is not None for m in students for r in m.abilities.values()):
            note = (
                "(student − chance) / (teacher − chance), from 0 to 100 %; chance is what guessing scores: the blind "
                f"teacher where it was asked, else what the data states. {EMPTY}: the teacher is no better than chance."
            )
            seeing = [model for model in students if not model.blind]
            title = "Retention above chance, %"
            found.append(_by_ability(report, seeing, title, note, lambda r: r.retention_over_chance, against=True))
        note = "Questions on which the student says what its teacher says, right or wrong."
        title = "Agreement with the teacher, %"
        found.append(_by_ability(report, students, title, note, lambda r: r.agreement, against=True))
    if any(result.extra for model in report.models for result in model.abilities.values()):
        found.append(_extra_table(report))
    return [*found, _perplexity_table(report), _cost_table(report)]


def to_data(report: Report) -> dict[str, Any]:
    """The report as JSON can hold it: no NaN, no infinity."""
    return {
        "suite": report.suite,
        "metric": report.metric,
        "source": report.source,
        "questions": {ability: sum(i.ability == ability for i in report.items) for ability in report.abilities},
        "models": [
            {
                "label": model.label,
                "path": model.path,
                "layers": model.layers,
                "against": model.against,
                "blind": model.blind,
                "mean": _ability_data(model.mean),
                "abilities": {ability: _ability_data(result) for ability, result in model.abilities.items()},
            }
            for model in report.models
        ],
        "bad_samples": list(report.bad_samples),
        "request": report.request,
        "environment": report.environment,
    }


def print_report(report: Report, console: Terminal) -> None:
    """The short form: score and retention of every model."""
    for table in tables(report)[: 2 if any(m.against for m in report.models) else 1]:
        if not console.is_terminal:
            console.print(plain(table), soft_wrap=True)
            continue
        shown = RichTable(title=Text(table.title), title_justify="left", header_style="bold")
        for i, column in enumerate(table.columns):
            shown.add_column(Text(printable(column, CELL)), justify="left" if i == 0 else "right")
        for i, row in enumerate(table.rows):
            # Only the mean, the last column, shows its interval: the others would not fit.
            *cells, last = (Text(printable(cell, CELL)) for cell in row)
            shown.add_row(*cells, last.append(f" {_bracketless(table.details[i][-1])}".rstrip(), "dim"))
        console.print(shown)
    if report.bad_samples:
        console.print(f"{len(report.bad_samples)} bad samples were skipped; results.json lists them")


def plain(table: Table) -> str:
    """The table in aligned plain text, for logs."""
    rows = [
        [*row[:-1], f"{row[-1]} {detail[-1]}".rstrip()] for row, detail in zip(table.rows, table.details, strict=True)
    ]
    cells = [[printable(cell, CELL) for cell in row] for row in (table.columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([table.title, *(line.rstrip() for line in lines), ""])


Pick = Callable[[AbilityResult], "Interval | float | None"]


def _by_ability(
    report: Report, models: Sequence[ModelResult], title: str, note: str, pick: Pick, against: bool = False
) -> Table:
    """One row per model, one column per ability, the mean last; values in per cent."""
    several = len(report.abilities) > 1
    rows: list[list[str]] = []
    details: list[list[str]] = []
    shades: list[list[float | None]] = []
    for model in models:
        head = [model.label, *([model.against or EMPTY] if against else [])]
        results = [model.abilities[ability] for ability in report.abilities] + ([model.mean] if several else [])
        found = [pick(result) for result in results]
        rows.append(head + [_percent(value) for value in found])
        details.append([""] * len(head) + [_range(value) for value in found])
        shades.append([*(None for _ in head), *(_value(value) for value in found)])
    columns = ["model", *(["against"] if against else []), *report.abilities, *(["mean"] if several else [])]
    return Table(title=title, columns=columns, rows=rows, note=note, details=details, shades=shades)


def _extra_table(report: Report) -> Table:
    """The numbers that only this metric has (F1, acc+, unparsed answers)."""
    rows = []
    for model in report.models:
        for name, result in [*model.abilities.items(), ("mean or total", model.mean)]:
            rows += [[model.label, name, key, _number(value, 4)] for key, value in result.extra.items()]
    return Table(title="More of this metric", columns=["model", "ability", "number", "value"], rows=rows)


def _perplexity_table(report: Report) -> Table:
    rows = [
        [m.label, *(_number(r.perplexity) for r in (*m.abilities.values(), m.mean)), _number(m.mean.nll, 4)]
        for m in report.models
    ]
    return Table(
        title="Perplexity of the reference answers",
        note="exp of the mean negative log-likelihood per token; 'all' weighs every token alike.",
        columns=["model", *report.abilities, "all", "nats per token"],
        rows=rows,
    )


def _cost_table(report: Report) -> Table:
    rows = [
        [m.label, m.path, m.layers, str(m.mean.n), f"{m.mean.seconds:.1f}", _rate(m.mean.tokens_per_second)]
        for m in report.models
    ]
    return Table(
        title="Models and cost",
        note="Seconds to generate all answers; tokens of prompts and answers per second.",
        columns=["model", "checkpoint", "layers", "questions", "seconds", "tokens/s"],
        rows=rows,
    )


def _ability_data(result: AbilityResult) -> dict[str, Any]:
    data: dict[str, Any] = {"n": result.n, "correct": result.correct}
    data |= _interval_data("accuracy", result.score)
    data |= _interval_data("retention", result.retention)
    data |= {
        "retention_over_chance": result.retention_over_chance,
        "chance": result.chance,
        "chance_from": result.chance_from,
    }
    data |= _interval_data("agreement", result.agreement)
    numbers = asdict(result)
    for key in ("nll", "perplexity", "seconds", "tokens_per_second"):
        data[key] = numbers[key] if math.isfinite(numbers[key]) else None
    return data | ({"metric": result.extra} if result.extra else {})


def _interval_data(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {name: None, f"{name}_interval": None}
    value = interval.value if math.isfinite(interval.value) else None  # of no question
    return {name: value, f"{name}_interval": [interval.low, interval.high]}


def _value(value: Interval | float | None) -> float | None:
    number = value.value if isinstance(value, Interval) else value
    return None if number is None or math.isnan(number) else number


def _percent(value: Interval | float | None) -> str:
    number = _value(value)
    return EMPTY if number is None else f"{100 * number:.1f}"


def _range(value: Interval | float | None) -> str:
    known = isinstance(value, Interval) and math.isfinite(value.value)
    return f"[{100 * value.low:.1f}, {100 * value.high:.1f}]" if known else ""  # type: ignore[union-attr]


def _bracketless(text: str) -> str:
    return text.strip("[]").replace(", ", "–")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else EMPTY


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):  # made of nothing
        return EMPTY
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.2e}"
