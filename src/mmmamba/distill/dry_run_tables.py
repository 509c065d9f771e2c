"""The tables of a dry run: parameters, memory, and tokens with hours, with a column for each stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmmamba.distill.gpus import GPUS
from mmmamba.distill.memory_estimate import MOST_ROWS, UNIT, Memory
from mmmamba.distill.parameters import known_parts, label
from mmmamba.distill.stage_estimate import StageEstimate
from mmmamba.report.table import Table, table_of


def tables(stages: Sequence[StageEstimate], gpu: str) -> list[Table]:
    """Parameters, memory, and tokens with hours, each with a column a stage."""
    names = [stage.name for stage in stages]
    memory, unit = _memory(stages, gpu)
    return [
        table_of("Parameters", ("", *names), _parameters(stages)),
        table_of(f"Memory, {unit}", ("", *names), memory),
        table_of(f"Work on one {gpu}", ("", *names, "all"), _work(stages)),
    ]


def _parameters(stages: Sequence[StageEstimate]) -> list[Sequence[Any]]:
    counts = [stage.work.counts for stage in stages]
    parts = [part for part in known_parts() if any(part in one.trained for one in counts)]
    return [
        *((label(part), *(one.trained.get(part) for one in counts)) for part in parts),
        ("trained", *(one.moved for one in counts)),
        ("share", *(f"{100 * one.moved / one.total:.1f} %" for one in counts)),
        ("frozen", *(one.total - one.moved for one in counts)),
    ]


def _memory(stages: Sequence[StageEstimate], gpu: str) -> tuple[list[Sequence[Any]], str]:
    """The rows, and the unit of their sizes."""
    unit, name = peak_unit(stage.memory.peak for stage in stages)
    on_top = [stage.memory.moments[stage.memory.peak_moment] for stage in stages]

    def size(value: float | None) -> str | None:
        return None if value is None else f"{value / unit:,.2f}"

    rows: list[Sequence[Any]] = [("tokens of a row", *(s.row for s in stages))]
    held = dict.fromkeys(part for s in stages for part in s.memory.held)
    rows += [(part, *(size(s.memory.held.get(part)) for s in stages)) for part in held]
    parts = dict.fromkeys(part for moment in on_top for part in moment)
    rows += [(part, *(size(moment.get(part)) for moment in on_top)) for part in parts]
    rows += [("peak", *(size(s.memory.peak) for s in stages))]
    for moment in dict.fromkeys(moment for s in stages for moment in s.memory.moments):
        rows.append((f"in all in {moment}", *(size(_in_all(s.memory, moment)) for s in stages)))
    rows += [
        (f"fits {gpu} ({GPUS[gpu].memory / 1e9:.0f} GB)", *("yes" if s.row <= s.fitting else "no" for s in stages)),
        ("greatest row that would", *(s.fitting if s.fitting < UNIT * MOST_ROWS else "over a million" for s in stages)),
    ]
    return rows, name


def _work(stages: Sequence[StageEstimate]) -> list[Sequence[Any]]:
    tokens = [stage.steps * stage.tokens for stage in stages]
    hours = [stage.steps * stage.seconds / 3600 for stage in stages]
    return [
        ("steps", *(s.steps for s in stages), sum(s.steps for s in stages)),
        ("samples a step", *(s.work.config.batch_size for s in stages), None),
        ("tokens a step", *(round(s.tokens) for s in stages), None),
        ("rows a step", *(round(s.rows, 1) for s in stages), None),
        ("tokens", *(round(n) for n in tokens), round(sum(tokens))),
        ("seconds a step", *(s.seconds for s in stages), None),
        ("hours", *hours, sum(hours)),
    ]


def peak_unit(peaks: Iterable[int]) -> tuple[float, str]:
    """The unit that peaks of this size are read in."""
    return (1e9, "GB") if max(peaks) >= 1e9 else (1e6, "MB")


def _in_all(memory: Memory, moment: str) -> int | None:
    """All that is in use at a moment, where a stage has it."""
    if moment not in memory.moments:
        return None
    return sum(memory.held.values()) + sum(memory.moments[moment].values())
