"""The one kind of table of this package, as Markdown and on the terminal (as HTML: :mod:`mmmamba.report.html`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as Grid
from rich.text import Text

from mmmamba.errors import printable
from mmmamba.progress import Terminal
from mmmamba.report import markdown
from mmmamba.report.number_format import shown

PLAIN_WIDTH = 1000  # a log file has no width: there a table is as wide as its content
CELL = 1000  # characters of a cell on the terminal


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under column names.

    Attributes:
        note: a sentence or two between the title and the rows.
        shades: per row and column how good a cell is, 0 … 1, or None for a cell that is not coloured.
        details: per row and column small print that belongs to a cell, such as its interval.
        right: per column whether it is aligned to the right. Empty: every column but the first.
        markup: the cells are Markdown themselves, though not HTML.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    shades: Sequence[Sequence[float | None]] = ()
    details: Sequence[Sequence[str]] = ()
    right: Sequence[bool] = ()
    markup: bool = False

    @property
    def aligned_right(self) -> Sequence[bool]:
        return self.right or [i > 0 for i in range(len(self.columns))]

    def markdown(self, level: int = 3) -> str:
        """The table under a heading of that level; a cell's small print follows it in the same cell."""
        lines = [f"{'#' * level} {markdown.text(self.title)}", ""]
        if self.note:
            lines += [self.note, ""]
        return "\n".join([*lines, *self.grid()]) + "\n"

    def grid(self) -> list[str]:
        """The lines of the table in Markdown, without its heading and note."""
        text = _inline if self.markup else markdown.text
        lines = ["| " + " | ".join(map(text, self.columns)) + " |"]
        lines.append("|" + "".join("---:|" if right else "---|" for right in self.aligned_right))
        for i, row in enumerate(self.rows):
            details = self.details[i] if self.details else [""] * len(row)
            cells = [f"{text(cell)} {text(detail)}".rstrip() for cell, detail in zip(row, details, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        return lines


def _inline(text: str) -> str:
    """Markdown of a user on one line of a cell, without HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of values: numbers are formatted and aligned to the right, None is an empty cell."""
    values = [[*row] for row in rows]
    numeric = [
        bool(values) and all(row[i] is None or isinstance(row[i], (int, float)) for row in values)
        for i in range(len(columns))
    ]
    return Table(title=title, columns=columns, rows=[[shown(cell) for cell in row] for row in values], right=numeric)


def show(table: Table, console: Terminal | None = None) -> None:
    """Print a table, on stdout unless ``console`` is given. Only the last column shows its small print."""
    if console is None:
        console = Terminal() if Terminal().file.isatty() else Terminal(width=PLAIN_WIDTH)
    grid = Grid(title=Text(printable(table.title, CELL)), title_justify="left", box=box.SIMPLE_HEAD)
    for name, right in zip(table.columns, table.aligned_right, strict=True):
        grid.add_column(Text(printable(name, CELL)), justify="right" if right else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        cells = [Text(printable(cell, CELL)) for cell in row]
        if table.details and table.details[i][-1]:
            cells[-1].append(f" {printable(unbracketed(table.details[i][-1]), CELL)}", "dim")
        grid.add_row(*cells)
    console.print(grid)


def unbracketed(detail: str) -> str:
    """Small print that is set apart by its looks: an interval without its brackets, 31.4–68.6."""
    return detail.strip("[]").replace(", ", "–")
