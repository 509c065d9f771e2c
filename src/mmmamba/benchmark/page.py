"""The report as one HTML page that needs nothing beside itself, in the looks of the evaluation's."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.results import Results
from mmmamba.benchmark.tables import notes, tables
from mmmamba.evaluation.tables import Table
from mmmamba.figures import THEMES, render

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


def html(results: Results, title: str, summary: str) -> str:
    """The page: the claim, the plots (twice, for light and dark readers), every table, the machine."""
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(summary)}</p>']
    every = tables(results)
    body += [_table(table) for table in every[:1]]
    body += [_figure(results, name) for name in PLOTS]
    body += ["<h2>All figures</h2>", *(_table(table) for table in every[1:])]
    body += _list("Notes", notes(results))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in results.environment.items())
    body += ["<h2>Machine</h2>", f'<div class="card"><dl>{rows}</dl></div>']
    style = files("mmmamba.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=escape(title), style=style, body="\n".join(body))


def _figure(results: Results, name: str) -> str:
    drawn = [draw(results, name, theme) for theme in THEMES]
    if drawn[0] is None:
        return ""
    day, night = (
        f"data:image/svg+xml;base64,{base64.b64encode(render(figure, 'svg')).decode('ascii')}"
        for figure in drawn
        if figure is not None
    )
    caption = escape(PLOTS[name].caption)
    return (
        f'<div class="card wide"><figure><picture><source media="(prefers-color-scheme: dark)" srcset="{night}">'
        f'<img src="{day}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure></div>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for i, row in enumerate(table.rows):
        details = table.details[i] if table.details else [""] * len(row)
        cells = (f"<td>{escape(cell)}{_small(detail)}</td>" for cell, detail in zip(row, details, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    grid = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<section class="card"><h3>{escape(table.title)}</h3>{note}{grid}</section>'


def _small(detail: str) -> str:
    return f"<small>{escape(detail.strip('[]').replace(', ', '–'))}</small>" if detail else ""


def _list(title: str, items: Sequence[str]) -> list[str]:
    lines = [f"<li>{escape(item)}</li>" for item in items]
    return [f"<h2>{escape(title)}</h2>", "<ul>", *lines, "</ul>"] if items else []
