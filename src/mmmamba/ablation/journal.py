"""``results.jsonl``: one line for each finished cell and one for the plan; append, read, merge."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmmamba.ablation.plan import Cell, Plan
from mmmamba.checkpoints.io import write_atomically
from mmmamba.config_files import from_dict, to_dict
from mmmamba.errors import UserError
from mmmamba.jsonfile import parse_json

RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Ability:
    """One ability of one student: ``n`` questions; shares of them from 0 to 1.

    ``teacher`` is the teacher's accuracy on them, ``retention`` min(accuracy / teacher, 1), None where the teacher has
    none right; ``agreement`` how often both say the same; ``nll`` nats per token of the reference answers.
    """

    n: int
    accuracy: float
    teacher: float
    retention: float | None
    agreement: float
    nll: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished cell.

    Attributes:
        table, cell, seed: its place in the plan.
        id: of all that decides the result (see :attr:`mmmamba.ablation.plan.Cell.id`).
        steps_scale: what the plan's steps were multiplied with.
        base, set: the recipe and the changes to it.
        steps, batch_sizes: of the stages.
        losses: stage → the loss that was logged last.
        softmax_layers: those that a measurement picked; None where none was made.
        abilities: name → numbers.
        mean: ``accuracy`` and ``retention`` over the abilities that the plan's mean counts.
        seconds: ``distill`` and ``evaluate``, of the process that finished them.
        shared: whether stages 1 and 2 were another run's, whose seconds are not counted.
        resumed: whether the distillation had been begun by an earlier process.
        device, precision, versions, teacher: what it was made on, and from which teacher (name and hash).
        commands: two command lines that repeat it.
    """

    table: str
    cell: str
    seed: int
    id: str
    steps_scale: float = 1.0
    base: str
    set: tuple[str, ...]
    steps: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    losses: dict[str, float]
    softmax_layers: tuple[int, ...] | None = None
    abilities: dict[str, Ability]
    mean: dict[str, float | None]
    seconds: dict[str, float]
    shared: bool = False
    resumed: bool = False
    device: str
    precision: str
    versions: dict[str, str]
    teacher: dict[str, str]
    commands: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, int, str, float]:
        """Different for any two lines of a file."""
        return self.table, self.cell, self.seed, self.id, self.steps_scale

    def of(self, cell: Cell) -> Result:
        """The same numbers for another cell with the same run, with the commands that repeat it now."""
        kind = self.device if self.device in ("cpu", "mps") else "cuda"  # a GPU has its own name there
        return replace(
            self, table=cell.table, cell=cell.name, base=cell.base, set=cell.set, commands=cell.commands(kind)
        )


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of a results file: cells in the order of their lines, and the plan of the last plan line."""

    cells: tuple[Result, ...] = ()
    plan: Plan | None = None
    steps_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _PlanLine:
    plan: Plan
    steps_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _CellLine:
    result: Result


def read(path: Path) -> Results:
    """The results in a file; empty where there is none. An incomplete last line is left out and reported.

    Raises:
        UserError: for any other line that is broken, naming file, line and field.
    """
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a {RESULTS}")
        return Results()
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if rest:
        where = f"{path}:{len(lines) + 1}"
        print(f"{where}: the incomplete last line of a killed run is left out; its cell is unfinished", file=sys.stderr)
    cells: list[Result] = []
    plan: Plan | None = None
    scale = 1.0
    for number, line in enumerate(lines, start=1):
        found = _parsed(line, f"{path}:{number}")
        if isinstance(found, _PlanLine):
            plan, scale = found.plan, found.steps_scale
        else:
            cells.append(found.result)
    return Results(cells=tuple(cells), plan=plan, steps_scale=scale)


def _parsed(line: str, where: str) -> _PlanLine | _CellLine:
    data = parse_json(line, where)
    if not isinstance(data, dict) or not {"plan", "result"} & set(data):
        raise UserError(f"{where}: holds neither 'plan' nor 'result': not a line of mmmamba ablate")
    return from_dict(_PlanLine, data, where) if "plan" in data else from_dict(_CellLine, data, where)


class Journal:
    """A results file that grows. A line is safe on the disk when :meth:`add` returns.

    Args:
        path: the file; made with the first line. An incomplete last line is cut off here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = read(path)
        if path.is_file():
            whole = path.read_bytes().rpartition(b"\n")
            if whole[2]:
                write_atomically(path, lambda temporary: temporary.write_bytes(whole[0] + whole[1]))

    def note_plan(self, plan: Plan, steps_scale: float) -> None:
        """Append the plan, unless it is the one that the file has."""
        if (self.results.plan, self.results.steps_scale) != (plan, steps_scale):
            self._append(_PlanLine(plan=plan, steps_scale=steps_scale))
            self.results = replace(self.results, plan=plan, steps_scale=steps_scale)

    def add(self, result: Result) -> None:
        """Append a finished cell."""
        self._append(_CellLine(result=result))
        self.results = replace(self.results, cells=(*self.results.cells, result))

    def rename(self, cells: Iterable[Cell]) -> None:
        """Give each line the name and the commands that its run has among ``cells`` now.

        A run is identified by what decides its result. Its name, and the changes to a recipe that lead to it, may
        change later; the commands printed with a result must still repeat it. If the name of a line is gone or belongs
        to another run, the line gets the names that its run has now, if any.
        """
        asked: dict[str, list[Cell]] = {}
        seeds: dict[tuple[str, str], set[int]] = {}
        for cell in cells:
            asked.setdefault(cell.id, []).append(cell)
            seeds.setdefault((cell.table, cell.name), set()).add(cell.seed)
        lines: dict[Any, Result] = {}
        for result in self.results.cells:
            name, alike = (result.table, result.cell), asked.get(result.id, [])
            now = [cell for cell in alike if (cell.table, cell.name) == name]
            if not now and (name not in seeds or result.seed in seeds[name]):
                now = alike
            for line in [result.of(cell) for cell in now] or [result]:
                lines.setdefault(line.key, line)
        if tuple(lines.values()) != self.results.cells:
            self.results = replace(self.results, cells=tuple(lines.values()))
            _write(self.path, self.results)

    def find(self, cell: Cell) -> Result | None:
        """The line of a cell with its present name and content."""
        names = cell.table, cell.name, cell.seed, cell.id
        return next((r for r in self.results.cells if (r.table, r.cell, r.seed, r.id) == names), None)

    def same(self, cell: Cell) -> Result | None:
        """A line of any cell with the same run."""
        return next((result for result in self.results.cells if result.id == cell.id), None)

    def _append(self, line: _PlanLine | _CellLine) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(encoded(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: not written: {error.strerror}") from error


def encoded(line: Any) -> bytes:
    """A line of the file."""
    return (json.dumps(to_dict(line), ensure_ascii=False, allow_nan=False) + "\n").encode()


def merge(into: Path, sources: Sequence[Path]) -> int:
    """Append the cells of other files to ``into``, each once; of several lines of a cell the first is kept.

    Returns:
        how many cells are new in ``into``.
    """
    for path in sources:
        if not path.is_file():
            raise UserError(f"--merge {path}: no such file")
    here, *others = [read(path) for path in (into, *sources)]
    cells = {result.key: result for result in here.cells}
    for other in others:
        for result in other.cells:
            cells.setdefault(result.key, result)
    _write(into, replace(here, cells=tuple(cells.values())))
    return len(cells) - len(here.cells)


def _write(path: Path, results: Results) -> None:
    """Write the whole file again."""
    lines: list[_PlanLine | _CellLine] = []
    if results.plan is not None:
        lines.append(_PlanLine(plan=results.plan, steps_scale=results.steps_scale))
    lines += [_CellLine(result=result) for result in results.cells]
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(map(encoded, lines))))


def of_table(results: Results, table: str) -> dict[str, dict[int, Result]]:
    """cell → seed → result of one table, at the plan's scale; where a cell was made twice, its last line counts."""
    assert results.plan is not None
    found: dict[str, dict[int, Result]] = {cell: {} for cell in results.plan.tables[table].cells}
    for result in _at_scale(results):
        if result.table == table and result.cell in found:
            found[result.cell][result.seed] = result
    return found


def _at_scale(results: Results) -> Iterable[Result]:
    return (result for result in results.cells if result.steps_scale == results.steps_scale)
