"""The tables that a claim is read off: students beside the published way of running their teacher, beside the best way
that is known here, and how each one's cost grows with the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmmamba.benchmark.cells import absent, change, held, number, times
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.paper import CONTEXT, DEVICE, POINTS
from mmmamba.benchmark.results import Point, Results, What
from mmmamba.benchmark.subjects import Series, Style
from mmmamba.report.number_format import EMPTY
from mmmamba.report.table import Table


def protocol(results: Results) -> Table:
    """The paper's comparison: a token of each student against one of the teacher in both published styles."""
    context = claim_context(results)
    teachers = [one for one in results.series if one.published]
    columns = ["model", "ms a token", "GB"]
    for teacher in teachers:
        columns += [f"× {teacher.label}", "memory"]
    rows = []
    for one in (*teachers, *(one for one in results.series if one.kind != "teacher")):
        point = results.find(one.label, "decode", context)
        if point is None:
            continue
        ours = point.measured
        found = [absent(point)] * 2 if ours is None else [number(ours.timing.ms), number(held(ours) / 1e9)]
        row = [one.label, *found]
        for teacher in teachers:
            row += [EMPTY] * 2 if one.published or ours is None else _against(results, teacher, context, ours)
        rows.append(row)
    note = (
        "How many times a token of the teacher takes longer when it is run as published (a cache concatenated anew for "
        "every token, no CUDA graph), without and with an attention mask, and how the memory differs."
    )
    if results.paper and rows:
        rows += _papers_rows(len(teachers))
        note += f" The paper's own points are its own: one {DEVICE}, {CONTEXT:,} tokens, against its own teacher."
    return Table(title=f"The paper's protocol, behind {context:,} tokens", columns=columns, rows=rows, note=note)


def _against(results: Results, teacher: Series, context: int, ours: Measured) -> list[str]:
    point = results.find(teacher.label, "decode", context)
    theirs = None if point is None else point.measured
    if theirs is None:
        return [absent(point)] * 2
    return [times(theirs.timing.ms / ours.timing.ms), change(held(ours) / held(theirs))]


def _papers_rows(teachers: int) -> list[list[str]]:
    base = next(point for point in POINTS if point.kind == "teacher")
    rows = []
    for point in POINTS:
        ratios = [f"{base.ms / point.ms:.1f}", change(point.gigabytes / base.gigabytes)]
        told = [EMPTY] * 2 if point is base else ratios
        name = f"the paper's {point.model} ({DEVICE})"
        rows.append([name, number(point.ms), f"{point.gigabytes:.2f}", *told * teachers])
    return rows


# ---------------------------------------------------------------------------------------------- the optimised teacher


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A row of :func:`optimised`: one figure of the teacher beside the same of each student.

    Attributes:
        what, style: the points it is read from.
        variant: of the students' points; ``teachers`` of the teacher's, where it is another.
        more: whether more of it is better.
        fair: what a well-made teacher reaches at the paper's context and size on an H100: the best that plain scripts
            with CUDA graphs were seen to give, a little rounded. A student's ratio to a slower one would say nothing.
    """

    name: str
    what: What
    value: Callable[[Measured], float]
    style: Style = "engine"
    variant: str = ""
    teachers: str | None = None
    more: bool = False
    fair: float | None = None


QUANTITIES = (
    Quantity(name="ms a token", what="decode", value=lambda m: m.timing.ms, fair=7.0),
    Quantity(name="ms a token, int8 weights in both", what="decode", value=lambda m: m.timing.ms, style="int8"),
    Quantity(name="GB while decoding", what="decode", value=lambda m: held(m) / 1e9),
    Quantity(
        name="ms to the first token, text", what="prefill", value=lambda m: m.timing.ms, variant="text", fair=3300.0,
    ),
    *(
        Quantity(
            name=f"tokens/s at the greatest batch, SSM states in {variant}", what="batch",
            value=lambda m: m.tokens_per_s, variant=variant, teachers="cache", more=True, fair=195.0,
        )
        for variant in ("float32", "bfloat16")
    ),
)  # fmt: skip


def optimised(results: Results) -> Table:
    """Each student against its teacher where both are run in the best way that is known here."""
    context = claim_context(results)
    known = {(one.subject, one.style): one.label for one in results.series}
    teachers = [one for one in results.series if one.kind == "teacher" and one.style == "engine"]
    students = [one for one in results.series if one.kind != "teacher" and one.style == "engine"]
    judged = results.paper and context == CONTEXT and "H100" in results.environment["device"]
    columns = ["", "teacher", *(["it counts when"] if judged else [])]
    for student in students:
        columns += [student.label, "×"]
    rows = []
    for teacher in teachers:
        for row in QUANTITIES:
            base = results.find(known[teacher.subject, row.style], row.what, context, row.teachers or row.variant)
            theirs = None if base is None or base.measured is None else row.value(base.measured)
            points = [results.find(known[one.subject, row.style], row.what, context, row.variant) for one in students]
            if base is None or all(point is None for point in points):
                continue
            name = row.name if len(teachers) == 1 else f"{row.name} ({teacher.label})"
            cells = [name, absent(base) if theirs is None else number(theirs)]
            cells += [_verdict(row, theirs)] if judged else []
            for point in points:
                cells += _beside(row, theirs, point)
            rows.append(cells)
    note = (
        "The teacher with a preallocated cache and, on a GPU, CUDA graphs, as this package serves it; ×: how many "
        "times the student is better."
    )
    if judged:
        note += " The ratios count only if the teacher is as good as a well-made one was seen to be on such a machine."
    title = f"Against the optimised teacher, behind {context:,} tokens"
    return Table(title=title, columns=columns, rows=rows, note=note)


def _verdict(row: Quantity, theirs: float | None) -> str:
    if row.fair is None or theirs is None:
        return EMPTY
    reached = theirs >= row.fair if row.more else theirs <= row.fair
    return f"{'≥' if row.more else '≤'} {row.fair:,g}: {'it does' if reached else 'IT DOES NOT'}"


def _beside(row: Quantity, theirs: float | None, point: Point | None) -> list[str]:
    if point is None or point.measured is None:
        return [absent(point), EMPTY]
    ours = row.value(point.measured)
    return [number(ours), EMPTY if theirs is None else times(ours / theirs if row.more else theirs / ours)]


# ---------------------------------------------------------------------------------------------- growth


def growth(results: Results) -> Table:
    """How latency and memory of each series change over all contexts, and where memory ends."""
    rows = []
    for one in results.series:
        points = [p for c in results.contexts if (p := results.find(one.label, "decode", c)) is not None]
        found = [(p.task.context, p.measured) for p in points if p.measured is not None]
        if len(found) < 2:
            continue
        row = [one.label, f"{found[0][0]:,}", f"{found[-1][0]:,}"]
        for values in ([m.timing.ms for _, m in found], [held(m) / 1e9 for _, m in found]):
            row += [f"{number(min(values))}–{number(max(values))}", f"{100 * (max(values) / min(values) - 1):,.1f} %"]
        full = next((p.task.context for p in points if p.oom), None)
        rows.append([*row, EMPTY if full is None else f"{full:,}"])
    columns = ["model", "from", "to", "ms a token", "differ by", "GB", "differ by", "out of memory at"]
    note = "Over all contexts measured: the least and the most, and by how much the most is more."
    return Table(title="Growth with the context", columns=columns, rows=rows, note=note)


def claim_context(results: Results) -> int:
    """The paper's context where it was measured, else the longest at which a student was."""
    students = {one.label for one in results.series if one.kind != "teacher"}
    known = [
        point.task.context
        for point in results.points
        if point.task.what == "decode" and point.task.series in students and point.measured is not None
    ]
    return CONTEXT if CONTEXT in known else max(known, default=0)
