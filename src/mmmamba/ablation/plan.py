"""The content of a table file: named changes to a recipe, for several seeds, in tables that each answer a question.

::

    name: small
    base: nano-linear
    seeds: [0, 1, 2]
    questions: {abilities: [read, recall-1x, recall-4x], mean: [read, recall-1x], limit: 100}
    tables:
      rotation:
        title: Does the mixer need the teacher's rotation?
        reference: rope
        claims: [{better: rope, worse: none}]
        cells:
          rope: {}
          none: {mixer.rope: false}

A cell maps keys of a recipe to values. Two words in it are not keys: ``base`` names another recipe to start from, and
``about`` says in a few words what is changed, where the keys themselves would fill a page.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmmamba import yaml12
from mmmamba.config_files import from_dict, load_yaml, read_override, to_dict
from mmmamba.distill.recipe import DistillRecipe, find_recipe, load_recipe
from mmmamba.distill.run_folder import digest
from mmmamba.distill.stages import ALIGNMENT
from mmmamba.distill.train_config import MOST
from mmmamba.errors import UserError
from mmmamba.evaluation.suite import NANO_ABILITIES, NANO_LIMIT

BASE, ABOUT = "base", "about"  # the words in a cell that are no keys of a recipe
MEAN = "mean"
_NAME = re.compile(r"\w[\w.+-]*")  # is part of folders' names and of command lines
_ANY_DEPTH = 1000  # layers of a teacher that is not known yet: enough to see whether a recipe's `layers` makes sense


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What every student is asked, from the built-in suite.

    Attributes:
        data: folder that ``mmmamba data build`` made (default: the recipe's ``data.root``).
        abilities: what is asked about, in the order of the tables' columns.
        mean: the abilities that the mean counts (default: all); the others are shown next to it.
        limit: questions an ability.
        max_new_tokens: longest answer, in tokens.
        seed: chooses the questions; the same ones for all cells.
    """

    data: str | None = None
    abilities: tuple[str, ...] = NANO_ABILITIES
    mean: tuple[str, ...] = ()
    limit: int = NANO_LIMIT
    max_new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, known in (("abilities", self.abilities, NANO_ABILITIES), ("mean", self.mean, self.abilities)):
            for value in values:
                if value not in known:
                    raise ValueError(f"{name}: unknown ability {value!r}, must be among {', '.join(known)}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names an ability twice")
        if not self.abilities:
            raise ValueError("abilities is empty")
        if self.limit < 1 or self.max_new_tokens < 1:
            raise ValueError(f"limit ({self.limit}) and max_new_tokens ({self.max_new_tokens}) must be at least 1")

    @property
    def counted(self) -> tuple[str, ...]:
        """The abilities that the mean counts."""
        return self.mean or self.abilities

    @property
    def beside(self) -> tuple[str, ...]:
        """The abilities outside the mean, such as longer texts than in distillation."""
        return tuple(ability for ability in self.abilities if ability not in self.counted)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """``better`` keeps more than ``worse`` of the teacher, on an ability or in the mean; what ``source`` says."""

    better: str
    worse: str
    ability: str = MEAN
    source: str = "the paper"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cells that are read side by side.

    Attributes:
        title: the question that the table answers.
        note: what a reader should know.
        base: a recipe, by path or built-in name (default: the plan's).
        set: recipe keys laid over the base of every cell.
        setting: these changes in words, where the keys themselves would fill a page.
        seeds: instead of the plan's.
        reference: the cell that the others are subtracted from.
        claims: what the results may confirm or contradict.
        paper: cell → what the paper reports for it.
        paper_metric: what those numbers are.
        cells: name → recipe keys laid over all that; ``base`` in it names another recipe, ``about`` says what changed.
    """

    title: str
    note: str = ""
    base: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    setting: str = ""
    seeds: tuple[int, ...] = ()
    reference: str | None = None
    claims: tuple[Claim, ...] = ()
    paper: dict[str, str] = field(default_factory=dict)
    paper_metric: str = ""
    cells: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        _check_names("cell", self.cells)
        _check_seeds(self.seeds)
        named = [("reference", self.reference)] if self.reference is not None else []
        named += [("claims", cell) for claim in self.claims for cell in (claim.better, claim.worse)]
        named += [("paper", cell) for cell in self.paper]
        for where, cell in named:
            if cell not in self.cells:
                raise ValueError(f"{where}: no cell {cell!r}, must be among {', '.join(self.cells)}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole table file.

    Attributes:
        name: also of the default folder, ``runs/NAME``, and of the files next to a page.
        base: a recipe, by path or built-in name.
        set: recipe keys laid over the base of every cell.
        seeds: of each cell, unless its table says otherwise.
        questions, tables: see their classes.
    """

    name: str
    base: str
    set: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    questions: Questions = field(default_factory=Questions)
    tables: dict[str, Comparison]

    def __post_init__(self) -> None:
        _check_names("table", self.tables)
        _check_names("plan", [self.name])
        _check_seeds(self.seeds)
        if not self.seeds:
            raise ValueError("seeds is empty")
        for name, table in self.tables.items():
            for claim in table.claims:
                if claim.ability not in (MEAN, *self.questions.abilities):
                    raise ValueError(
                        f"tables.{name}.claims: {claim.ability!r} is neither 'mean' nor an ability that is asked"
                    )


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One distillation and its evaluation.

    Attributes:
        table, name, seed: its place in the plan.
        base, set: the recipe's name and the ``key=value`` changes that make ``recipe`` of it.
        recipe: the whole recipe.
        questions: what the student is asked.
    """

    table: str
    name: str
    seed: int
    base: str
    set: tuple[str, ...]
    recipe: DistillRecipe
    questions: Questions

    def __str__(self) -> str:
        return f"{self.table}/{self.name}, seed {self.seed}"

    @cached_property
    def id(self) -> str:
        """A hash of everything that decides the result: cells with one id are one run, even under several names."""
        recipe = _stated(self.recipe)
        recipe["data"].pop("workers", None)  # any number of them gives the same rows
        return digest([recipe, _stated(self.questions), self.data])

    @cached_property
    def alignment(self) -> str:
        """A hash of all that stages 1 and 2 may depend on: cells of one alignment can share them."""
        later = {"layers", *self.recipe.stages} - {*ALIGNMENT}
        return digest({key: value for key, value in _stated(self.recipe).items() if key not in later})

    @property
    def data(self) -> str:
        """The folder of the questions."""
        return self.questions.data or self.recipe.data.root

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps of each stage."""
        return tuple(stage.steps for stage in self.recipe.stages.values())

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples a step of each stage."""
        return tuple(stage.batch_size for stage in self.recipe.stages.values())

    @property
    def aligning(self) -> int:
        """Steps of the stages that cells of one alignment share."""
        return sum(self.recipe.stages[name].steps for name in ALIGNMENT)

    @property
    def folder(self) -> str:
        """The folder of its run, next to that of its alignment; no other recipe gets this name."""
        return f"seed{self.seed}-{self.table}-{self.name}-{digest(self.recipe)[:8]}"

    def commands(self, device: str) -> tuple[str, str]:
        """The two command lines that repeat the cell on a ``device`` of that kind, and nothing else."""
        out = f"runs/{self.table}-{self.name}-seed{self.seed}"
        changes = [word for change in self.set for word in ("--set", change)]
        asked = [word for ability in self.questions.abilities for word in ("--abilities", ability)]
        numbers = {"limit": self.questions.limit, "max-new-tokens": self.questions.max_new_tokens,
                   "seed": self.questions.seed}  # fmt: skip
        options = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        return (
            shlex.join(["mmmamba", "distill", self.base, *changes, "--device", device, "--out", out]),
            shlex.join(["mmmamba", "eval", f"{out}/model", "--against", self.recipe.teacher, "--data-dir", self.data,
                        *asked, *options, "--no-blind", "--device", device, "--out", f"{out}-eval"]),
        )  # fmt: skip


def load_plan(table: str | Path) -> tuple[Plan, Path]:
    """Read a table file strictly, by path or built-in name; return the plan and its path.

    Raises:
        UserError: for an unknown key, a cell written twice, a name that nothing has; file and field are named.
    """
    path = find_recipe(table)
    data = load_yaml(path)
    if "tables" not in data:
        raise UserError(f"{path}: has no 'tables': it is a recipe; a table file names cells (see docs/ablation.md)")
    return from_dict(Plan, data, where=path), path


def overlaid(plan: Plan, set: Sequence[str]) -> Plan:
    """The plan with ``key=value`` changes laid over every table; a cell's own changes stay above them."""
    given: dict[str, Any] = {}
    for change in set:
        try:
            key, value = read_override(change)
        except UserError as error:
            raise UserError(f"--set: {error}") from error
        given[key] = value
    tables = {name: replace(table, set=_merged(table.set, given)) for name, table in plan.tables.items()}
    return replace(plan, tables=tables) if given else plan


def cells_of(plan: Plan, where: Path | str, *, steps_scale: float = 1.0) -> list[Cell]:
    """Every cell of a plan, seed by seed, with its whole recipe.

    Args:
        plan: the plan.
        where: its file, for messages.
        steps_scale: factor on every stage's steps; a stage that has any keeps at least one.

    Raises:
        UserError: for a recipe that is not there or a key that it does not have; file, table and cell are named.
    """
    if not 0 < steps_scale <= MOST:
        raise UserError(f"--steps-scale must be greater than 0 and at most {MOST:,}, got {steps_scale:g}")
    found = []
    for table_name, table in plan.tables.items():
        for name, changes in table.cells.items():
            field = f"{where}: tables.{table_name}.cells.{name}"
            own = {key: value for key, value in changes.items() if key not in (BASE, ABOUT)}
            laid = _merged(plan.set, table.set, own)
            if "seed" in laid:
                raise UserError(f"{field}: 'seed' is not to be changed: the key 'seeds' gives every cell its own")
            base = str(changes.get(BASE) or table.base or plan.base)
            for seed in table.seeds or plan.seeds:
                overrides = [f"{key}={flow(value)}" for key, value in {**laid, "seed": seed}.items()]
                try:
                    recipe = load_recipe(DistillRecipe, base, overrides)
                    if steps_scale != 1:
                        overrides += _scaled(recipe, steps_scale)
                        recipe = load_recipe(DistillRecipe, base, overrides)
                    recipe.layer_map(_ANY_DEPTH)
                except UserError as error:
                    raise UserError(f"{field}: {error}") from error
                found.append(
                    Cell(
                        table=table_name,
                        name=name,
                        seed=seed,
                        base=base,
                        set=tuple(overrides),
                        recipe=recipe,
                        questions=plan.questions,
                    )
                )
    return found


def select(cells: Sequence[Cell], only: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """The cells that ``TABLE`` or ``TABLE/CELL`` and the seeds name; all where nothing is named."""
    for given in only:
        table, slash, name = given.partition("/")
        if not any(cell.table == table and (not slash or cell.name == name) for cell in cells):
            known = dict.fromkeys(cell.table for cell in cells)
            if slash and table in known:
                known = dict.fromkeys(f"{table}/{cell.name}" for cell in cells if cell.table == table)
            raise UserError(f"--only {given}: there is no such cell; known: {', '.join(known)}")
    for seed in seeds:
        if seed not in {cell.seed for cell in cells}:
            raise UserError(f"--seeds {seed}: no cell has it; known: {', '.join(map(str, _seeds(cells)))}")
    return [
        cell for cell in cells
        if (not only or cell.table in only or f"{cell.table}/{cell.name}" in only) and (not seeds or cell.seed in seeds)
    ]  # fmt: skip


def aligned(cell: Cell) -> Cell:
    """The same cell up to stage 2, with nothing in it that only later stages read: one recipe for one alignment."""
    last = flow(to_dict(replace(cell.recipe.stage2, steps=0)))
    overrides = (*cell.set, "name=aligned", "layers=linear", f"stage3={last}", "stage4=null")
    return replace(cell, set=overrides, recipe=load_recipe(DistillRecipe, cell.base, overrides))


def flow(value: Any) -> str:
    """A value as YAML on one line, as ``--set`` takes it."""
    text = yaml12.dump(value, flow=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _stated(config: Any) -> dict[str, Any]:
    """What a config says, its name and what says the default left out: a key that is new later changes no hash."""
    said = {}
    for each in fields(config):
        value = getattr(config, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if each.name != "name" and value != default:
            said[each.name] = _stated(value) if is_dataclass(value) else to_dict(value)
    return said


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Each layer over those before it; a key that comes again moves to its later place."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged.pop(key, None)
            merged[key] = value
    return merged


def _scaled(recipe: DistillRecipe, factor: float) -> list[str]:
    steps = {name: stage.steps for name, stage in recipe.stages.items()}
    return [f"{stage}.steps={max(1, round(count * factor))}" for stage, count in steps.items() if count]


def _check_names(kind: str, names: Iterable[str]) -> None:
    found = list(names)
    if not found:
        raise ValueError(f"there is no {kind}")
    for name in found:
        if not _NAME.fullmatch(name):
            raise ValueError(f"the name {name!r} of a {kind} may hold letters, digits, '_', '.', '+' and '-' only")


def _check_seeds(seeds: Sequence[int]) -> None:
    if len({*seeds}) < len(seeds):
        raise ValueError("seeds names a seed twice")


def _seeds(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.seed for cell in cells})
