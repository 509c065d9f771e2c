"""The frame and the pieces of a self-contained HTML page, as every report of the package uses them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from mmmamba.report.plot_style import render
from mmmamba.report.table import Table, unbracketed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mmmamba">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole page around the pieces of its body."""
    style = files("mmmamba.report").joinpath("page.css").read_text(encoding="utf-8")
    return _PAGE.format(title=escape(title), style=style, body="\n".join(body))


def figure(light: Figure, dark: Figure, caption: str) -> str:
    """A plot in both themes, for light and dark readers."""
    day, night = (data_url("image/svg+xml", render(drawn, "svg")) for drawn in (light, dark))
    return (
        f'<div class="card wide"><figure><picture><source media="(prefers-color-scheme: dark)" srcset="{night}">'
        f'<img src="{day}" alt="{escape(caption)}"></picture><figcaption>{escape(caption)}</figcaption></figure></div>'
    )


def table(given: Table, folded: bool = False) -> str:
    """A table as a card; a folded one shows its title until it is clicked."""
    head = "".join(f"<th>{escape(column)}</th>" for column in given.columns)
    rows = []
    for i, row in enumerate(given.rows):
        cells = []
        for j, cell in enumerate(row):
            shade = given.shades[i][j] if given.shades else None
            detail = given.details[i][j] if given.details else ""
            style = "" if shade is None else f' style="background:rgb(47 158 119 / {0.42 * shade**2:.3f})"'
            small = f"<small>{escape(unbracketed(detail))}</small>" if detail else ""
            cells.append(f"<td{style}>{escape(cell)}{small}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{escape(given.note)}</p>' if given.note else ""
    grid = f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if folded:
        return f'<details class="card"><summary>{escape(given.title)}</summary>{grid}</details>'
    return f'<section class="card"><h3>{escape(given.title)}</h3>{grid}</section>'


def listed(title: str, items: Sequence[str]) -> list[str]:
    """A heading with a list below it; nothing where there are no items."""
    return (
        [f"<h2>{escape(title)}</h2>", "<ul>", *(f"<li>{escape(item)}</li>" for item in items), "</ul>"] if items else []
    )


def facts(title: str, values: Mapping[str, str]) -> list[str]:
    """A heading with names and values below."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return [f"<h2>{escape(title)}</h2>", f'<div class="card"><dl>{rows}</dl></div>']


def data_url(kind: str, content: bytes) -> str:
    """A file's content as an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
