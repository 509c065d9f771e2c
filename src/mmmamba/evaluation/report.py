"""What an evaluation leaves behind: results.json, results.md, predictions-LABEL.jsonl, abilities.png and .svg.

The one-file web page is `write_html` in `webpage.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmmamba.checkpoints.io import write_atomically
from mmmamba.errors import UserError
from mmmamba.evaluation import plots
from mmmamba.evaluation.results import Report
from mmmamba.evaluation.tables import tables, to_data
from mmmamba.evaluation.webpage import Answer, Example, pick_examples, write_html
from mmmamba.figures import render
from mmmamba.jsonfile import read_json

__all__ = ["Answer", "Example", "check_folder", "markdown", "pick_examples", "write_html", "write_report"]

RESULTS = "results.json"


def check_folder(out: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that holds another evaluation: before the models run, not after.

    The same request may be repeated into the same folder.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    earlier = out / RESULTS
    if overwrite or not earlier.is_file():
        return
    if read_json(earlier).get("request") != request:
        raise UserError(f"{earlier} holds another evaluation; choose another --out, or pass --overwrite to replace it")


def write_report(report: Report, out: Path) -> Path:
    """Write everything into the folder ``out``; results.json comes last, so its presence means the rest is there."""
    names = {model.label: f"predictions-{file_label(model.label)}.jsonl" for model in report.models}
    for label, name in names.items():
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in report.predictions[label]]
        _write(out / name, ("\n".join(lines) + "\n").encode())
    for stale in set(out.glob("predictions-*.jsonl")) - {out / name for name in names.values()}:
        stale.unlink()  # of the evaluation that this one replaces
    figure = plots.ability_bars(report)
    _write(out / "abilities.png", render(figure, "png"))
    _write(out / "abilities.svg", render(figure, "svg"))
    _write(out / "results.md", markdown(report).encode())
    data = to_data(report) | {"predictions": names}
    _write(out / RESULTS, (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return out / RESULTS


def markdown(report: Report) -> str:
    """The report as a Markdown page, with the plot, the tables and how to repeat it."""
    lines = [f"# Evaluation: {report.suite}", ""]
    lines += [f"{len(report.items)} questions from `{report.source}`, answered greedily.", ""]
    lines += ["![Score and retention by ability](abilities.svg)", ""]
    for table in tables(report):
        lines += [table.markdown()]
    if report.bad_samples:
        lines += [f"### Skipped: {len(report.bad_samples)} bad samples", ""]
        lines += [f"- {note['reason']}" for note in report.bad_samples] + [""]
    lines += ["### How this was made", "", "```", json.dumps(report.request, ensure_ascii=False), "```", ""]
    lines += [f"- {name}: {value}" for name, value in report.environment.items()]
    return "\n".join(lines) + "\n"


def file_label(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-") or "model"


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
