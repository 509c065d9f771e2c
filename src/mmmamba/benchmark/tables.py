"""A report's results as tables, for Markdown, the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from mmmamba.benchmark.claims import growth, optimised, protocol
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.results import Point, Results, absence
from mmmamba.progress import Terminal
from mmmamba.report.number_format import EMPTY, number
from mmmamba.report.table import Table, show


def notes(results: Results) -> list[str]:
    """Why points are missing, and what else is to be known about others."""
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


def print_results(results: Results, console: Terminal) -> None:
    """Print the tables that compare students with their teacher: run as published, and run in the best way known."""
    for one in tables(results, HEADLINE[:2]):
        show(one, console if console.is_terminal else None)


# ---------------------------------------------------------------------------------------------- one by one


def _latency(results: Results) -> Table:
    return _by_context(
        results,
        "Next-token latency, ms",
        "One sequence. The median of single steps, with their quartiles.",
        lambda m: number(m.timing.ms),
        lambda m: f"[{number(m.timing.low)}, {number(m.timing.high)}]",
    )


def _memory(results: Results) -> Table:
    counted = any(measured.peak_bytes is not None for _, _, measured in results.measured_points("decode"))
    return _by_context(
        results,
        "Memory while decoding, GB",
        "One sequence: the most that tensors held during the steps, weights included. In brackets: what is held "
        "between steps."
        if counted
        else "One sequence: weights, states and room for more. PyTorch counts no peak on a CPU.",
        lambda m: number(m.held_bytes / 1e9),
        lambda m: "" if m.peak_bytes is None else f"[{number(m.resident_bytes / 1e9)}]",
    )


def _state(results: Results) -> Table:
    each = tuple(one for one in results.series if one.style == "engine")  # what a state holds is the same in any style
    return _by_context(
        replace(results, series=each),
        "State of one sequence, MB",
        "What is kept of a sequence after its context: caches of softmax layers, states of the others.",
        lambda m: number(m.state_bytes / 1e6),
    )


def _by_context(
    results: Results,
    title: str,
    note: str,
    show: Callable[[Measured], str],
    detail: Callable[[Measured], str] | None = None,
) -> Table:
    """Decoding: one row per series, one column per context."""
    contexts = results.contexts
    rows, details = [], []
    for one in results.series:
        points = [results.find(one.label, "decode", context) for context in contexts]
        if all(point is None for point in points):
            continue
        cells = [absence(p) if p is None or p.measured is None else show(p.measured) for p in points]
        small = ["" if p is None or p.measured is None or detail is None else detail(p.measured) for p in points]
        rows.append([one.label, *cells])
        details.append(["", *small])
    columns = ["model", *(f"{context:,}" for context in contexts)]
    return Table(title=title, columns=columns, rows=rows, note=note, details=details)


def _steps(results: Results) -> Table:
    """Percentiles, cold and warm, and the limit of each decoding point."""
    rows = []
    for one, point, found in results.measured_points("decode"):
        limit = results.limit_ms(found)
        rows.append(
            [
                one.label, f"{point.task.context:,}", number(found.timing.ms), number(found.timing.p90),
                number(found.timing.p99), number(found.timing.cold), number(limit),
                f"{100 * limit / found.timing.ms:.0f} %", "yes" if found.graph else "no", f"{found.timing.samples}",
            ]
        )  # fmt: skip
    columns = ["model", "tokens", "median", "90 %", "99 %", "cold", "limit", "of the limit", "graph", "samples"]
    note = (
        "Inter-token times in ms. Cold: the very first step at that point. Limit: a step's bytes over the copy rate "
        f"({results.rates.bytes / 1e9:,.0f} GB/s) or its operations over the matrix rate "
        f"({results.rates.flops / 1e12:,.3g} TFLOP/s), both measured in this run, whichever takes longer."
    )
    return Table(title="Decoding, step by step", columns=columns, rows=rows, note=note)


def _first_token(results: Results, variant: str) -> Table:
    rows = []
    for one, point, found in results.measured_points("prefill"):
        if point.task.variant != variant:
            continue
        limit = results.limit_ms(found)
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
    note = f"Prompts of {of}; until the first token is on the host. All styles of a model read prompts in this way."
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
                rows.append([*row, absence(point), *[EMPTY] * 4])
                continue
            share = f"{100 * results.limit_ms(found) / found.timing.ms:.0f} %"
            rows.append(
                [*row, f"{found.batch:,}", number(found.timing.ms), number(found.tokens_per_s), share,
                 number(found.held_bytes / 1e9)]
            )  # fmt: skip
    columns = ["model", "state", "tokens", "greatest batch", "ms a step", "tokens/s", "of the limit", "GB"]
    note = (
        "The most sequences found to fit (to a sixteenth), each after a context of that many tokens, decoded at once."
    )
    if results.request.get("memory"):
        note += f" Weights and states were allowed {results.request['memory']:g} GB."
    return Table(title="The greatest batch", columns=columns, rows=rows, note=note)


#: The tables of a report by the name that pages use, the most important first.
TABLES: Mapping[str, Callable[[Results], Table]] = {
    "protocol": protocol,
    "optimised": optimised,
    "growth": growth,
    "latency": _latency,
    "steps": _steps,
    "prefill": lambda results: _first_token(results, "text"),
    "prefill-images": lambda results: _first_token(results, "images"),
    "memory": _memory,
    "state": _state,
    "batch": _batches,
}

HEADLINE = ("protocol", "optimised", "growth")


def tables(results: Results, names: Iterable[str] = tuple(TABLES)) -> list[Table]:
    """The tables of those names; those without a figure are left out."""
    return [made for name in names if (made := TABLES[name](results)).rows]
