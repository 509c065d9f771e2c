"""The report as one HTML page that needs nothing beside itself, in the looks of the evaluation's."""

from __future__ import annotations

from html import escape

from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.results import Results
from mmmamba.benchmark.tables import HEADLINE, TABLES, notes, tables
from mmmamba.report.html import facts, figure, listed, page, table
from mmmamba.report.plot_style import THEMES


def html(results: Results, title: str, summary: str) -> str:
    """The page: the claim, the plots (twice, for light and dark readers), every table, the machine."""
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(summary)}</p>']
    body += [table(one) for one in tables(results, HEADLINE)]
    body += [_figure(results, name) for name in PLOTS]
    rest = [name for name in TABLES if name not in HEADLINE]
    body += ["<h2>All figures</h2>", *(table(one) for one in tables(results, rest))]
    body += listed("Notes", notes(results))
    body += facts("Machine", results.environment)
    return page(title, body)


def _figure(results: Results, name: str) -> str:
    light, dark = (draw(results, name, theme) for theme in THEMES)
    return "" if light is None or dark is None else figure(light, dark, PLOTS[name].caption)
