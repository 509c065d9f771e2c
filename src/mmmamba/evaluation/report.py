"""The files of an evaluation: results.json, results.md, predictions-LABEL.jsonl, abilities.png and abilities.svg.

`webpage.py` writes the one-file web page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmmamba.errors import UserError
from mmmamba.evaluation import plots
from mmmamba.evaluation.aggregate import AbilityResult, Report
from mmmamba.evaluation.statistics import Interval
from mmmamba.evaluation.tables import tables
from mmmamba.file_names import file_labels
from mmmamba.jsonfile import read_json
from mmmamba.outputs import Ledger
from mmmamba.report.markdown import code, text
from mmmamba.report.plot_style import render

VERB = "eval"
RESULTS = "results.json"
FILES = ("abilities.png", "abilities.svg", "results.md", RESULTS)


def check_results(
    out: Path, request: Mapping[str, Any], labels: Sequence[str], *, read: Iterable[Path], overwrite: bool
) -> None:
    """Refuse to replace another evaluation or somebody's files: before the models run, not after.

    The same request may be repeated into the same folder.

    Args:
        out: the folder.
        request: what is asked for.
        labels: of the report's rows.
        read: files that the evaluation reads.
        overwrite: replace what is there.
    """
    ledger, earlier = Ledger(out, VERB), out / RESULTS
    otherwise = "choose another --out, or pass --overwrite to replace it"
    if not overwrite and ledger.wrote(RESULTS) and earlier.is_file():
        found = read_json(earlier).get("request")
        found = found if isinstance(found, dict) else {}
        other = [key for key in {**request, **found} if found.get(key) != request.get(key)]
        if other:
            raise UserError(f"{earlier} holds another evaluation (other {', '.join(other)}); {otherwise}")
    ledger.check([*FILES, *_prediction_files(labels).values()], otherwise=otherwise, read=read, overwrite=overwrite)


def write_report(report: Report, out: Path) -> Path:
    """Write everything into the folder ``out``; results.json comes last, so its presence means the rest is there.

    What an earlier evaluation wrote there is replaced, other files of these names too (see :func:`check_results`).
    """
    names = _prediction_files([model.label for model in report.models])
    figure = plots.ability_bars(report)
    data = to_data(report) | {"predictions": names}
    predictions = {
        name: "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in report.predictions[label]).encode()
        for label, name in names.items()
    }
    Ledger(out, VERB).write(
        predictions
        | {
            "abilities.png": render(figure, "png"),
            "abilities.svg": render(figure, "svg"),
            "results.md": markdown(report).encode(),
            RESULTS: (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        }
    )
    return out / RESULTS


def _prediction_files(labels: Sequence[str]) -> dict[str, str]:
    """label → the file of what that row said."""
    return {label: f"predictions-{name}.jsonl" for label, name in file_labels(labels).items()}


def markdown(report: Report) -> str:
    """The report as a Markdown page, with the plot, the tables and how to repeat it."""
    lines = [f"# Evaluation: {text(report.suite)}", ""]
    lines += [f"{len(report.items)} questions from {code(report.source)}, answered greedily.", ""]
    lines += ["![Score and retention by ability](abilities.svg)", ""]
    for table in tables(report):
        lines += [table.markdown()]
    if report.bad_samples:
        lines += [f"### Skipped: {len(report.bad_samples)} bad samples", ""]
        lines += [f"- {text(note['reason'])}" for note in report.bad_samples] + [""]
    lines += ["### How this was made", "", "```", json.dumps(report.request, ensure_ascii=False), "```", ""]
    lines += [f"- {name}: {text(value)}" for name, value in report.environment.items()]
    return "\n".join(lines) + "\n"


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
