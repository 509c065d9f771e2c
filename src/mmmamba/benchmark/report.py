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
    lines += [f"Copied at {results.rates.bytes / 1e9:,.0f} GB/s and multiplied at {results.rates.flops / 1e12:,.3g} "]
    lines[-1] += "TFLOP/s in the same run."
    lines += [""]
    for name, plot in PLOTS.items():
        if any(p.task.what == plot.what and p.measured is not None for p in results.points):
            lines += [f"![{plot.caption}]({name}.svg)", ""]
    for table in tables(results):
        lines += [table.markdown()]
    said = notes(results)
    lines += ["### Notes", "", *(f"- {note}" for note in said), ""] if said else []
    lines += ["### How this was made", "", "```", json.dumps(results.request, ensure_ascii=False), "```", ""]
    lines += [f"- {name}: {value}" for name, value in results.environment.items()]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_bytes(content))
