"""The paper's own figures, and the tables that claims are read from.

``protocol`` compares students with their teacher run in the published way, ``optimised`` with their teacher run in the
best way known here, and ``growth`` shows how the cost of each grows with the context.

The paper's figures (arXiv:2502.13145, the comparison of efficiency) are of one RTX 4090, HoVLE-2.6B's geometry, one
sequence. The teacher ran FlashAttention-2 without CUDA graphs, the students with them. From that come the headline's
20.6 and 13.5 times, and 75.8 % and 60.2 % less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.results import Point, Results, What, absence
from mmmamba.benchmark.subjects import Series, Style
from mmmamba.model.config import ModelConfig
from mmmamba.model.geometries import GEOMETRIES
from mmmamba.report.number_format import EMPTY, change, number, times
from mmmamba.report.table import Table

CONTEXT = 103_424  # tokens: the paper's "103K"
DEVICE = "RTX 4090"


@dataclass(frozen=True, kw_only=True)
class PaperPoint:
    """Next-token latency in milliseconds and memory in gigabytes (1e9 bytes) at :data:`CONTEXT` tokens."""

    model: str
    kind: str
    ms: float
    gigabytes: float


POINTS = (
    PaperPoint(model="HoVLE, FlashAttention-2", kind="teacher", ms=142.65, gigabytes=21.69),
    PaperPoint(model="mmMamba-linear", kind="linear", ms=6.94, gigabytes=5.22),
    PaperPoint(model="mmMamba-hybrid", kind="hybrid", ms=10.54, gigabytes=8.64),
)


def same_size(config: ModelConfig) -> bool:
    """Whether the paper's networks have this size."""
    paper = GEOMETRIES["hovle-2.6b"]
    return all(
        getattr(config, name) == getattr(paper, name) for name in ("hidden_size", "vocab_size", "num_layers")
    ) and all(
        getattr(config.decoder, name) == getattr(paper.decoder, name)
        for name in ("intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    )


# ---------------------------------------------------------------------------------------------- the paper's protocol


def protocol(results: Results) -> Table:
    """The paper's comparison: the time of a token of each student and of the teacher in both published styles."""
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
        found = [absence(point)] * 2 if ours is None else [number(ours.timing.ms), number(ours.held_bytes / 1e9)]
        row = [one.label, *found]
        for teacher in teachers:
            row += [EMPTY] * 2 if one.published or ours is None else _against(results, teacher, context, ours)
        rows.append(row)
    note = (
        "×: how many times as long the teacher takes for a token when it is run as published, without and with an "
        "attention mask. In the published way the cache is copied for every token, and there is no CUDA graph. "
        "'memory': how its memory differs from the teacher's."
    )
    if results.paper and rows:
        rows += _papers_rows(len(teachers))
        note += f" The paper's points are from one {DEVICE}, {CONTEXT:,} tokens, against the paper's own teacher."
    title = f"The paper's protocol, after a context of {context:,} tokens"
    return Table(title=title, columns=columns, rows=rows, note=note)


def _against(results: Results, teacher: Series, context: int, ours: Measured) -> list[str]:
    point = results.find(teacher.label, "decode", context)
    theirs = None if point is None else point.measured
    if theirs is None:
        return [absence(point)] * 2
    return [times(theirs.timing.ms / ours.timing.ms), change(ours.held_bytes / theirs.held_bytes)]


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
    """A row of :func:`optimised`: one figure of the teacher and of each student.

    Attributes:
        what, style: the points it is taken from.
        variant: of the students' points; ``teachers`` of the teacher's, where it is another.
        more: whether more of it is better.
        fair: what a good teacher reaches at the paper's context and size on an H100: the best result of plain scripts
            with CUDA graphs, slightly rounded. A student's ratio to a slower teacher would say nothing.
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
    Quantity(name="GB while decoding", what="decode", value=lambda m: m.held_bytes / 1e9),
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
    """Each student against its teacher, both run in the best way known here."""
    context = claim_context(results)
    teachers = [one for one in results.series if one.kind == "teacher" and one.style == "engine"]
    students = [one for one in results.series if one.kind != "teacher" and one.style == "engine"]
    judged = results.paper and context == CONTEXT and "H100" in results.environment["device"]
    columns = ["", "teacher", *(["teacher must reach"] if judged else [])]
    for student in students:
        columns += [student.label, "×"]
    several = len(teachers) > 1
    rows = [
        cells
        for teacher in teachers
        for row in QUANTITIES
        if (cells := _compared(results, row, teacher, students, judged=judged, several=several))
    ]
    note = (
        "The teacher runs as this package serves it: with a preallocated cache and, on a GPU, CUDA graphs. ×: how "
        "many times the student is better."
    )
    if judged:
        note += " A ratio counts only if the teacher itself is fast enough, as the third column says."
    title = f"Against the optimised teacher, after a context of {context:,} tokens"
    return Table(title=title, columns=columns, rows=rows, note=note)


def _compared(
    results: Results, row: Quantity, teacher: Series, students: Sequence[Series], *, judged: bool, several: bool
) -> list[str]:
    """One row of :func:`optimised`; empty where the teacher or all students lack it."""
    context = claim_context(results)
    known = {(one.subject, one.style): one.label for one in results.series}
    base = results.find(known[teacher.subject, row.style], row.what, context, row.teachers or row.variant)
    points = [results.find(known[one.subject, row.style], row.what, context, row.variant) for one in students]
    if base is None or all(point is None for point in points):
        return []
    theirs = None if base.measured is None else row.value(base.measured)
    name = f"{row.name} ({teacher.label})" if several else row.name
    cells = [name, absence(base) if theirs is None else number(theirs)]
    cells += [_verdict(row, theirs)] if judged else []
    for point in points:
        cells += _beside(row, theirs, point)
    return cells


def _verdict(row: Quantity, theirs: float | None) -> str:
    if row.fair is None or theirs is None:
        return EMPTY
    reached = theirs >= row.fair if row.more else theirs <= row.fair
    return f"{'≥' if row.more else '≤'} {row.fair:,g}: {'reached' if reached else 'NOT REACHED'}"


def _beside(row: Quantity, theirs: float | None, point: Point | None) -> list[str]:
    if point is None or point.measured is None:
        return [absence(point), EMPTY]
    ours = row.value(point.measured)
    return [number(ours), EMPTY if theirs is None else times(ours / theirs if row.more else theirs / ours)]


# ---------------------------------------------------------------------------------------------- growth


def growth(results: Results) -> Table:
    """How latency and memory of each series change over all contexts, and where it runs out of memory."""
    rows = []
    for one in results.series:
        points = [p for c in results.contexts if (p := results.find(one.label, "decode", c)) is not None]
        found = [(p.task.context, p.measured) for p in points if p.measured is not None]
        if len(found) < 2:
            continue
        row = [one.label, f"{found[0][0]:,}", f"{found[-1][0]:,}"]
        for values in ([m.timing.ms for _, m in found], [m.held_bytes / 1e9 for _, m in found]):
            row += [f"{number(min(values))}–{number(max(values))}", f"{100 * (max(values) / min(values) - 1):,.1f} %"]
        full = next((p.task.context for p in points if p.oom), None)
        rows.append([*row, EMPTY if full is None else f"{full:,}"])
    columns = ["model", "from", "to", "ms a token", "differ by", "GB", "differ by", "out of memory at"]
    note = "Over all contexts measured: the smallest and the largest value, and how much larger the largest is."
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
