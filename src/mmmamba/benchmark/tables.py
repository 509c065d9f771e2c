"""A report's results as tables, for Markdown, the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from mmmamba.benchmark.limits import Cost
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.paper import CONTEXT, DEVICE, POINTS
from mmmamba.benchmark.results import Point, Results, What
from mmmamba.benchmark.subjects import Series
from mmmamba.evaluation.tables import EMPTY, Table
from mmmamba.progress import table

FULL = "out of memory"
SKIPPED = "skipped"


def tables(results: Results) -> list[Table]:
    """Everything that a report says, most wanted first; tables without any figure are left out."""
    found = [
        claim(results),
        _by_context(
            results,
            "Next-token latency, ms",
            "One sequence. The median of single steps, with their quartiles.",
            "decode",
            "",
            lambda m: number(m.timing.ms),
            lambda m: f"[{number(m.timing.low)}, {number(m.timing.high)}]",
        ),
        _steps(results),
        *(_first_token(results, variant) for variant in ("text", "images")),
        _by_context(
            results,
            "Memory while decoding, GB",
            "One sequence: the most that tensors held during the steps, weights included; in brackets what lies there "
            "between steps."
            if _counted(results)
            else "One sequence: weights, states and room for more. PyTorch counts no peak on a CPU.",
            "decode",
            "",
            lambda m: number(held(m) / 1e9),
            lambda m: "" if m.peak_bytes is None else f"[{number(m.resident_bytes / 1e9)}]",
        ),
        _by_context(
            results,
            "State of one sequence, MB",
            "What a sequence leaves behind its context: caches of softmax layers, states of the others.",
            "decode",
            "",
            lambda m: number(m.state_bytes / 1e6),
        ),
        _batches(results),
    ]
    if results.paper:
        found.append(_paper())
    return [one for one in found if one.rows]


def claim(results: Results) -> Table:
    """How much faster and smaller each student is than each way of running the teacher, at one context."""
    context = claim_context(results)
    teachers = [one for one in results.series if one.kind == "teacher"]
    columns, rows = ["model", "ms a token", "GB"], []
    for teacher in teachers:
        columns += [f"× {teacher.label}", "memory"]
    for student in (one for one in results.series if one.kind != "teacher"):
        ours = results.measured(student.label, "decode", context)
        if ours is None:
            continue
        row = [student.label, number(ours.timing.ms), number(held(ours) / 1e9)]
        for teacher in teachers:
            point = results.find(teacher.label, "decode", context)
            theirs = None if point is None else point.measured
            if theirs is None:
                row += [_absent(point)] * 2
            else:
                row += [
                    f"{theirs.timing.ms / ours.timing.ms:.1f}",
                    f"{100 * (held(ours) / held(theirs) - 1):+.1f} %".replace("-", "−"),
                ]
        rows.append(row)
    note = "How many times a teacher's step takes longer, and how the student's memory differs from the teacher's."
    if results.paper:
        note += f" The paper says 20.6 and −75.8 % (linear), 13.5 and −60.2 % (hybrid) on one {DEVICE}."
    return Table(title=f"The claim, behind {context:,} tokens", columns=columns, rows=rows, note=note)


def claim_context(results: Results) -> int:
    """The paper's context where it was measured, else the longest at which a student was."""
    students = {one.label for one in results.series if one.kind != "teacher"}
    known = [
        point.task.context
        for point in results.points
        if point.task.what == "decode" and point.task.series in students and point.measured is not None
    ]
    return CONTEXT if CONTEXT in known else max(known, default=0)


def held(measured: Measured) -> int:
    """The memory to compare: the peak, or what lies there between steps where no peak is counted."""
    return measured.resident_bytes if measured.peak_bytes is None else measured.peak_bytes


def number(value: float) -> str:
    """Three significant digits at least, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def notes(results: Results) -> list[str]:
    """Why points are missing, and what was found at others beside their figures."""
    found = []
    for point in results.points:
        said = point.skipped or (point.measured.note if point.measured is not None else "")
        if said:
            found.append(f"{title(point)}: {said}")
    return found


def title(point: Point) -> str:
    task = point.task
    variant = f" ({task.variant})" if task.variant else ""
    return f"{task.series}, {task.what}{variant}, {task.context:,} tokens"


def print_results(results: Results, console: Console) -> None:
    """The short form: the claim and the latencies."""
    for one in tables(results)[:2]:
        table(one.title, one.columns, one.rows, console=console if console.is_terminal else None)


# ---------------------------------------------------------------------------------------------- one by one


def _by_context(
    results: Results,
    title: str,
    note: str,
    what: What,
    variant: str,
    show: Callable[[Measured], str],
    detail: Callable[[Measured], str] | None = None,
) -> Table:
    """A row a series, a column a context."""
    contexts = results.contexts
    rows, details = [], []
    for one in results.series:
        points = [results.find(one.label, what, context, variant) for context in contexts]
        if all(point is None for point in points):
            continue
        cells = [_absent(p) if p is None or p.measured is None else show(p.measured) for p in points]
        small = ["" if p is None or p.measured is None or detail is None else detail(p.measured) for p in points]
        rows.append([one.label, *cells])
        details.append(["", *small])
    columns = ["model", *(f"{context:,}" for context in contexts)]
    return Table(title=title, columns=columns, rows=rows, note=note, details=details)


def _absent(point: Point | None) -> str:
    return EMPTY if point is None else FULL if point.oom else SKIPPED


def _steps(results: Results) -> Table:
    """Percentiles, cold and warm, and the limit of each decoding point."""
    rows = []
    for one, point, found in _measured(results, "decode"):
        limit = limit_ms(results, found)
        rows.append(
            [
                one.label, f"{point.task.context:,}", number(found.timing.ms), number(found.timing.p90),
                number(found.timing.p99), number(found.timing.cold), number(limit),
                f"{100 * limit / found.timing.ms:.0f} %", "yes" if found.graph else "no", f"{found.timing.samples}",
            ]
        )  # fmt: skip
    columns = ["model", "tokens", "median", "90 %", "99 %", "cold", "limit", "of the limit", "graph", "samples"]
    note = (
        "Inter-token times in ms. Cold: the first step of all at that point. Limit: a step's bytes over the copy rate "
        f"({results.rates.bytes / 1e9:,.0f} GB/s) or its operations over the matrix rate "
        f"({results.rates.flops / 1e12:,.3g} TFLOP/s), both measured in this run, whichever takes longer."
    )
    return Table(title="Decoding, step by step", columns=columns, rows=rows, note=note)


def _first_token(results: Results, variant: str) -> Table:
    rows = []
    for one, point, found in _measured(results, "prefill"):
        if point.task.variant != variant:
            continue
        limit = limit_ms(results, found)
        pieces = "at once" if found.chunk is None or found.chunk >= point.task.context else f"{found.chunk:,}"
        memory = EMPTY if found.peak_bytes is None else number(found.peak_bytes / 1e9)
        rows.append(
            [
                one.label, f"{point.task.context:,}", number(found.timing.ms),
                f"{number(found.timing.low)}–{number(found.timing.high)}", number(found.timing.cold),
                number(found.tokens_per_s), f"{100 * limit / found.timing.ms:.0f} %", pieces, memory,
                f"{found.timing.samples}",
            ]
        )  # fmt: skip
    columns = [
        "model", "tokens", "first token, ms", "quartiles", "cold", "tokens/s", "of the limit", "read in", "peak GB",
        "samples",
    ]  # fmt: skip
    of = "text" if variant == "text" else "as many whole tiles as fit, from uint8 pictures"
    note = f"Prompts of {of}; until the first token is on the host. Both baselines read a prompt in this one way."
    return Table(title=f"Time to the first token, {variant}", columns=columns, rows=rows, note=note)


def _batches(results: Results) -> Table:
    rows = []
    for one in results.series:
        for point in results.points:
            task, found = point.task, point.measured
            if task.series != one.label or task.what != "batch":
                continue
            row = [one.label, task.variant, f"{task.context:,}"]
            if found is None:
                rows.append([*row, _absent(point), *[EMPTY] * 4])
                continue
            share = f"{100 * limit_ms(results, found) / found.timing.ms:.0f} %"
            rows.append(
                [*row, f"{found.batch:,}", number(found.timing.ms), number(found.tokens_per_s), share,
                 number(held(found) / 1e9)]
            )  # fmt: skip
    columns = ["model", "state", "tokens", "greatest batch", "ms a step", "tokens/s", "of the limit", "GB"]
    note = "The most sequences, each behind that many tokens, that were found to fit (to a sixteenth), decoded at once."
    if results.request.get("memory"):
        note += f" Weights and states may take {results.request['memory']:g} GB here."
    return Table(title="The greatest batch", columns=columns, rows=rows, note=note)


def _paper() -> Table:
    rows = [[point.model, number(point.ms), f"{point.gigabytes:.2f}"] for point in POINTS]
    note = f"Not measured here: one {DEVICE}, {CONTEXT:,} tokens; the teacher without CUDA graphs, the students with."
    return Table(title="The paper's own points", columns=["model", "ms a token", "GB"], rows=rows, note=note)


def _measured(results: Results, what: What) -> list[tuple[Series, Point, Measured]]:
    return [
        (one, point, point.measured)
        for one in results.series
        for point in results.points
        if point.task.series == one.label and point.task.what == what and point.measured is not None
    ]


def limit_ms(results: Results, found: Measured) -> float:
    return results.rates.ms(Cost(bytes=found.bytes, flops=found.flops))


def _counted(results: Results) -> bool:
    found: Sequence[tuple[Series, Point, Measured]] = _measured(results, "decode")
    return any(measured.peak_bytes is not None for _, _, measured in found)
