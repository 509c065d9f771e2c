"""The files of a report beside its ``results.json``: report.md, report.html, and each plot as PNG and SVG."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.results import Results
from mmmamba.benchmark.tables import HEADLINE, TABLES, notes, tables
from mmmamba.outputs import Ledger
from mmmamba.report import html
from mmmamba.report.markdown import code, text
from mmmamba.report.plot_style import THEMES, render

VERB = "bench"
PAGE = "report.html"


def check_report(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is measured, to replace files that no report of ours wrote.

    Raises:
        UserError: naming the file.
    """
    ledger = Ledger(folder, VERB)
    names = [f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")]
    ledger.check([*names, "report.md", PAGE], overwrite=overwrite, otherwise="choose another --report")


def write_report(results: Results, folder: Path) -> Path:
    """Write everything into ``folder`` and return the page; files that only an earlier report had are removed."""
    files: dict[str, bytes] = {}
    for name in PLOTS:
        figure = draw(results, name)
        if figure is not None:
            files |= {f"{name}.png": render(figure, "png"), f"{name}.svg": render(figure, "svg")}
    files["report.md"] = markdown(results).encode()
    files[PAGE] = web_page(results).encode()
    Ledger(folder, VERB).write(files)
    return folder / PAGE


def title(results: Results) -> str:
    models = results.request["models"]
    return f"Efficiency: {', '.join(models)}" if models else f"Efficiency: {results.request['geometry']}"


def summary(results: Results) -> str:
    """The sentence under the heading: what was measured, on what."""
    machine, weights = results.environment, "random weights" if not results.request["models"] else "given weights"
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    commit = f", commit {machine['commit']}" if "commit" in machine else ""
    return f"{machine['device']}, {weights} in {machine['weights']}; {versions}{commit}."


def markdown(results: Results) -> str:
    """The report as a Markdown page."""
    lines = [f"# {text(title(results))}", "", text(summary(results)), ""]
    for name, plot in PLOTS.items():
        if any(p.task.what == plot.what and p.measured is not None for p in results.points):
            lines += [f"![{plot.caption}]({name}.svg)", ""]
    lines += [table.markdown() for table in tables(results)]
    said = notes(results)
    lines += ["### Notes", "", *(f"- {text(note)}" for note in said), ""] if said else []
    return "\n".join([*lines, "### How this was made", "", machine(results)])


def machine(results: Results) -> str:
    """What a report was made on and what was asked for, as Markdown."""
    rates = f"copied {results.rates.bytes / 1e9:,.0f} GB/s, multiplied {results.rates.flops / 1e12:,.3g} TFLOP/s"
    lines = [f"- {name}: {text(value)}" for name, value in results.environment.items()]
    lines += [f"- in the same run: {rates}", f"- asked for: {code(json.dumps(results.request, ensure_ascii=False))}"]
    return "\n".join(lines) + "\n"


def web_page(results: Results) -> str:
    """The page: the claim, the plots (twice, for light and dark readers), every table, the machine."""
    body = [f"<h1>{escape(title(results))}</h1>", f'<p class="lead">{escape(summary(results))}</p>']
    body += [html.table(one) for one in tables(results, HEADLINE)]
    body += [_figure(results, name) for name in PLOTS]
    rest = [name for name in TABLES if name not in HEADLINE]
    body += ["<h2>All figures</h2>", *(html.table(one) for one in tables(results, rest))]
    body += html.listed("Notes", notes(results))
    body += html.facts("Machine", results.environment)
    return html.page(title(results), body)


def _figure(results: Results, name: str) -> str:
    light, dark = (draw(results, name, theme) for theme in THEMES)
    return "" if light is None or dark is None else html.figure(light, dark, PLOTS[name].caption)
