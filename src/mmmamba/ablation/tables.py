"""Results as Markdown: a table for each question of the plan, the verdict on each claim, the commands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmmamba.ablation.intervals import difference, t_interval, t_quantile, verdict
from mmmamba.ablation.journal import Result, Results, of_table
from mmmamba.ablation.plan import ABOUT, BASE, MEAN, Plan, flow
from mmmamba.errors import UserError
from mmmamba.evaluation.statistics import Interval
from mmmamba.report.number_format import EMPTY, number, percent
from mmmamba.report.table import Table


@dataclass(frozen=True)
class Measured:
    """One table of a plan with its results: cell → seed → result."""

    plan: Plan
    name: str
    cells: Mapping[str, Mapping[int, Result]]

    @classmethod
    def of(cls, results: Results, name: str) -> Measured:
        """Table ``name`` of ``results``.

        Raises:
            UserError: when the results hold no plan, or the plan has no such table.
        """
        if results.plan is None:
            raise UserError("the results hold no line with their plan; run mmmamba ablate with the table file once")
        if name not in results.plan.tables:
            raise UserError(f"the plan has no table '{name}'; known: {', '.join(results.plan.tables)}")
        return cls(results.plan, name, of_table(results, name))

    def retention(self, cell: str, ability: str = MEAN) -> dict[int, float]:
        """Seed → per cent of the teacher that is kept; a seed whose teacher has none right is left out."""
        kept = {}
        for seed, result in sorted(self.cells[cell].items()):
            share = self._mean(result) if ability == MEAN else result.abilities[ability].retention
            if share is not None:
                kept[seed] = 100 * share
        return kept

    def interval(self, cell: str, ability: str = MEAN) -> Interval | None:
        kept = self.retention(cell, ability)
        return t_interval(list(kept.values())) if kept else None

    def gain(self, better: str, worse: str, on: str = MEAN) -> Interval | None:
        """How many points more ``better`` keeps, paired by seed."""
        return difference(self.retention(better, on), self.retention(worse, on))

    def _mean(self, result: Result) -> float | None:
        shares = [result.abilities[ability].retention for ability in self.plan.questions.counted]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if known else None


def markdown(results: Results, name: str, image: str = "") -> str:
    """Everything about one table; ``image`` is the address of its plot."""
    measured = Measured.of(results, name)
    table = measured.plan.tables[name]
    done = {cell: seeds for cell, seeds in measured.cells.items() if seeds}
    lines = [f"**{table.title}**", ""]
    lines += [table.note, ""] if table.note else []
    if not done:
        return "\n".join([*lines, "Not measured yet."]) + "\n"
    lines += [*_grid(measured), "", _caption(measured, results.steps_scale), ""]
    lines += [f"- {line}" for line in _verdicts(measured)]
    lines += [""] if table.claims else []
    lines += [f"![{table.title}]({image})", ""] if image else []
    lines += _commands(done)
    return "\n".join(lines) + "\n"


def _grid(measured: Measured) -> list[str]:
    """The teacher, then every cell."""
    plan, table = measured.plan, measured.plan.tables[measured.name]
    questions = plan.questions
    steps = {result.steps for seeds in measured.cells.values() for result in seeds.values()}
    columns = ["cell", "changed", *(["steps"] if len(steps) > 1 else []), "seeds", "loss", "mean", *questions.abilities]
    columns += [f"against {table.reference}"] if table.reference else []
    columns += [f"paper: {table.paper_metric}" if table.paper_metric else "paper"] if table.paper else []
    rows = [_teacher_row(measured, columns)]
    for cell, seeds in measured.cells.items():
        row = [f"`{cell}`", _changed(plan, measured.name, cell)]
        row += [_steps(seeds.values())] if len(steps) > 1 else []
        row += [str(len(seeds)), _loss(seeds.values()), _kept(measured.interval(cell))]
        for ability in questions.abilities:
            interval = measured.interval(cell, ability)
            row.append(_kept(interval) if ability in questions.beside else _value(interval))
        if table.reference:
            row.append(EMPTY if cell == table.reference else signed(measured.gain(cell, table.reference)))
        row += [table.paper.get(cell, EMPTY)] if table.paper else []
        rows.append(row)
    right = [i > 1 for i in range(len(columns))]
    return Table(title=table.title, columns=columns, rows=rows, right=right, markup=True).grid()


def _teacher_row(measured: Measured, columns: Sequence[str]) -> list[str]:
    """The teacher's right answers in per cent (all cells answer the same questions)."""
    results = [result for seeds in measured.cells.values() for result in seeds.values()]
    abilities, counted = results[0].abilities, measured.plan.questions.counted
    said = {name: percent(ability.teacher) for name, ability in abilities.items()}
    said[MEAN] = percent(sum(abilities[name].teacher for name in counted) / len(counted))
    return ["*teacher, % right*", *(said.get(column, "") for column in columns[1:])]


def _changed(plan: Plan, table: str, cell: str) -> str:
    changes = dict(plan.tables[table].cells[cell])
    base, about = changes.pop(BASE, None), changes.pop(ABOUT, None)
    if about is not None:
        return str(about)
    words = [f"{key}={flow(value)}" for key, value in changes.items()]
    return ", ".join(f"`{word}`" for word in ([f"base: {base}"] if base else []) + words) or EMPTY


def _caption(measured: Measured, scale: float) -> str:
    plan, table = measured.plan, measured.plan.tables[measured.name]
    counts = sorted({len(seeds) for seeds in measured.cells.values() if seeds})
    results = [result for seeds in measured.cells.values() for result in seeds.values()]
    steps = {(result.steps, result.batch_sizes) for result in results}
    devices = ", ".join(dict.fromkeys(f"{result.device} ({result.precision})" for result in results))
    text = f"Changes to `{table.base or plan.base}`"
    shared = {} if table.setting else {**plan.set, **table.set}
    text += f" with {table.setting}" if table.setting else ""
    text += f" with {', '.join(f'`{key}={flow(value)}`' for key, value in shared.items())}" if shared else ""
    if len(steps) == 1:
        (numbers, batches), *_ = steps
        text += "; " + " + ".join(f"{n:,} × {b}" for n, b in zip(numbers, batches, strict=True)) + " steps × samples"
    text += f" (all steps × {scale:g})" if scale != 1 else ""
    text += (
        f"; {devices}. Per cent of the teacher's score that is kept, capped at 100 for each ability, from greedy "
        f"answers to {_asked(results)}. The mean counts {', '.join(plan.questions.counted)}. "
    )
    spread = [n for n in counts if n > 1]
    if spread:
        t = ", ".join(f"{t_quantile(n - 1):.2f} for {n}" for n in spread)
        text += (
            f"± is half of the 95 % t interval of the mean over seeds (t is {t} seeds). All cells answer the same "
            "questions; the interval does not cover their choice. "
            "Differences are paired by seed, with their own t interval. "
        )
    if 1 in counts:
        text += "A single seed has no interval. "
    return text + "Loss: the last one logged in stage 3."


def _asked(results: Sequence[Result]) -> str:
    counts = sorted({ability.n for result in results for ability in result.abilities.values()})
    return f"{'–'.join(map(str, (counts[0], counts[-1])[: len(counts)]))} unseen questions an ability"


def _verdicts(measured: Measured) -> list[str]:
    lines = []
    for claim in measured.plan.tables[measured.name].claims:
        gain = measured.gain(claim.better, claim.worse, claim.ability)
        by = "" if gain is None else f" ({signed(gain)} points)"
        on = "" if claim.ability == MEAN else f" in {claim.ability}"
        lines.append(f"`{claim.better}` keeps more than `{claim.worse}`{on} ({claim.source}): "
                     f"**{verdict(gain)}**{by}")  # fmt: skip
    return lines


def _commands(done: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """The commands of every cell's first seed, folded away."""
    lines = [
        "<details><summary>Commands (of each cell's first seed; the others differ in seed=N)</summary>",
        "",
        "```sh",
    ]
    for cell, seeds in done.items():
        lines += [f"# {cell}", *seeds[min(seeds)].commands]
    return [*lines, "```", "", "</details>"]


def _steps(results: Iterable[Result]) -> str:
    found = sorted({result.steps for result in results})
    return ", ".join(" + ".join(f"{n:,}" for n in steps) for steps in found) or EMPTY


def _loss(results: Iterable[Result]) -> str:
    losses = [result.losses["stage3"] for result in results if "stage3" in result.losses]
    return number(sum(losses) / len(losses)) if losses else EMPTY


def _value(interval: Interval | None) -> str:
    return EMPTY if interval is None else f"{interval.value:.1f}"


def _kept(interval: Interval | None) -> str:
    if interval is None or math.isinf(interval.low):
        return _value(interval)
    return f"{interval.value:.1f} ± {interval.high - interval.value:.1f}"


def signed(interval: Interval | None) -> str:
    """A difference with its interval, such as +1.2 [0.4, 2.0]."""
    if interval is None:
        return EMPTY
    ends = "" if math.isinf(interval.low) else f" [{interval.low:+.1f}, {interval.high:+.1f}]"
    return f"{interval.value:+.1f}{ends}"
