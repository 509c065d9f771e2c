"""What a report leaves behind beside its ``results.json``: report.md, report.html, and each plot as PNG and SVG."""

from __future__ import annotations

import json
from pathlib import Path

from mmmamba.benchmark.page import html
from mmmamba.benchmark.plots import PLOTS, draw
from mmmamba.benchmark.results import Results
from mmmamba.benchmark.tables import notes, tables
from mmmamba.checkpoints.io import write_atomically
from mmmamba.figures import render


def write_report(results: Results, folder: Path) -> Path:
    """Write everything into ``folder`` and return the page."""
    for name in PLOTS:
        figure = draw(results, name)
        for kind in ("png", "svg"):
            if figure is None:
                (folder / f"{name}.{kind}").unlink(missing_ok=True)  # of the report that this one replaces
            else:
                _write(folder / f"{name}.{kind}", render(figure, kind))  # type: ignore[arg-type]
    _write(folder / "report.md", markdown(results).encode())
    return _write(folder / "report.html", html(results, title(results), summary(results)).encode())


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
    lines = [f"# {title(results)}", "", summary(results), ""]
    for name, plot in PLOTS.items():
        if any(p.task.what == plot.what and p.measured is not None for p in results.points):
            lines += [f"![{plot.caption}]({name}.svg)", ""]
    lines += [table.markdown() for table in tables(results)]
    said = notes(results)
    lines += ["### Notes", "", *(f"- {note}" for note in said), ""] if said else []
    return "\n".join([*lines, "### How this was made", "", machine(results)])


def machine(results: Results) -> str:
    """On what a report was made and what was asked for, as Markdown."""
    rates = f"copied {results.rates.bytes / 1e9:,.0f} GB/s, multiplied {results.rates.flops / 1e12:,.3g} TFLOP/s"
    lines = [f"- {name}: {value}" for name, value in results.environment.items()]
    lines += [f"- in the same run: {rates}", f"- asked for: `{json.dumps(results.request, ensure_ascii=False)}`"]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))
