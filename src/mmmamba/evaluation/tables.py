"""The tables of an evaluation's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mmmamba.evaluation.aggregate import AbilityResult, ModelResult, Report
from mmmamba.evaluation.statistics import Interval
from mmmamba.progress import Terminal
from mmmamba.report.number_format import EMPTY, number, percent
from mmmamba.report.table import Table, show

METRIC_TITLES = {
    "exact": "Exact match",
    "yes_no": "Accuracy of yes/no answers (POPE's rule)",
    "choice": "Accuracy of choices",
    "mme": "Accuracy per question (MME's rule)",
    "vqa": "VQA accuracy (TextVQA/GQA's rule)",
}


def tables(report: Report) -> list[Table]:
    """Everything a report says, the most important table first."""
    found = [_scores(report), *_against_the_teacher(report)]
    if any(result.extra for model in report.models for result in model.abilities.values()):
        found.append(_extras(report))
    return [*found, _perplexity(report), _cost(report)]


def print_report(report: Report, console: Terminal | None = None) -> None:
    """Print the first two tables: the scores, and what is kept of the teacher."""
    for table in tables(report)[: 2 if any(model.against for model in report.models) else 1]:
        show(table, console)
    if report.bad_samples:
        (console or Terminal()).print(f"{len(report.bad_samples)} bad samples were skipped; results.json lists them")


# ---------------------------------------------------------------------------------------------- one by one


def _scores(report: Report) -> Table:
    return _by_ability(
        report,
        report.models,
        f"{METRIC_TITLES[report.metric]}, %",
        "Greedy answers, with 95 % intervals. Every ability counts equally in the mean. 'blind': the same questions "
        "with the pictures blanked, which shows what guessing gives.",
        lambda r: r.score,
    )


def _against_the_teacher(report: Report) -> list[Table]:
    """Retention, retention above chance and agreement, where there is a teacher."""
    students = [model for model in report.models if model.against]
    if not students:
        return []
    note = "student / teacher, capped at 100 % per ability; mean over abilities; 95 % paired bootstrap intervals."
    found = [_by_ability(report, students, "Retention, %", note, lambda r: r.retention, against=True)]
    if any(r.retention_over_chance is not None for m in students for r in m.abilities.values()):
        note = (
            "(student − chance) / (teacher − chance), from 0 to 100 %. Chance is what guessing scores: the blind "
            f"teacher where it was asked, else what the data states. {EMPTY}: the teacher is no better than chance."
        )
        seeing = [model for model in students if not model.blind]
        title = "Retention above chance, %"
        found.append(_by_ability(report, seeing, title, note, lambda r: r.retention_over_chance, against=True))
    note = "Questions on which the student says what its teacher says, right or wrong."
    title = "Agreement with the teacher, %"
    return [*found, _by_ability(report, students, title, note, lambda r: r.agreement, against=True)]


def _by_ability(
    report: Report,
    models: Sequence[ModelResult],
    title: str,
    note: str,
    pick: Callable[[AbilityResult], Interval | float | None],
    against: bool = False,
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
        rows.append(head + [percent(_value(value)) for value in found])
        details.append([""] * len(head) + [_range(value) for value in found])
        shades.append([*(None for _ in head), *(_value(value) for value in found)])
    columns = ["model", *(["against"] if against else []), *report.abilities, *(["mean"] if several else [])]
    return Table(title=title, columns=columns, rows=rows, note=note, details=details, shades=shades)


def _extras(report: Report) -> Table:
    """The numbers that only this metric has (F1, acc+, unparsed answers)."""
    rows = []
    for model in report.models:
        for name, result in [*model.abilities.items(), ("mean or total", model.mean)]:
            rows += [[model.label, name, key, number(value, 4)] for key, value in result.extra.items()]
    return Table(title="More of this metric", columns=["model", "ability", "number", "value"], rows=rows)


def _perplexity(report: Report) -> Table:
    rows = [
        [m.label, *(number(r.perplexity) for r in (*m.abilities.values(), m.mean)), number(m.mean.nll, 4)]
        for m in report.models
    ]
    return Table(
        title="Perplexity of the reference answers",
        note="exp of the mean negative log-likelihood per token; 'all' weights every token equally.",
        columns=["model", *report.abilities, "all", "nats per token"],
        rows=rows,
    )


def _cost(report: Report) -> Table:
    rows = [
        [m.label, m.path, m.layers, str(m.mean.n), f"{m.mean.seconds:.1f}", number(m.mean.tokens_per_second)]
        for m in report.models
    ]
    return Table(
        title="Models and cost",
        note="Seconds to generate all answers; tokens of prompts and answers per second.",
        columns=["model", "checkpoint", "layers", "questions", "seconds", "tokens/s"],
        rows=rows,
    )


def _value(value: Interval | float | None) -> float | None:
    found = value.value if isinstance(value, Interval) else value
    return None if found is None or math.isnan(found) else found


def _range(value: Interval | float | None) -> str:
    """The ends of an interval, such as [31.4, 68.6]; '' where there is none."""
    if not isinstance(value, Interval) or not math.isfinite(value.value):
        return ""
    return f"[{percent(value.low)}, {percent(value.high)}]"
