"""``results.json``: every point as soon as it is measured, and what must be the same for a run to resume it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmmamba.benchmark.limits import Cost, Rates
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.subjects import Series
from mmmamba.checkpoints.io import write_atomically
from mmmamba.config_files import from_dict, to_dict
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.locks import LOCK
from mmmamba.report.number_format import EMPTY

RESULTS = "results.json"
FORMAT = 1
FULL, SKIPPED = "out of memory", "skipped"  # in place of a figure

What = Literal["decode", "prefill", "batch"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A point to measure.

    Attributes:
        series: label of the series it belongs to.
        what: ``decode`` a token, ``prefill`` a prompt, or find the greatest ``batch``.
        variant: of a prefill ``text`` or ``images``; of a batch the number format of the SSM states (``cache`` for a
            model without any).
        context: tokens.
    """

    series: str
    what: What
    variant: str = ""
    context: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """The outcome of a task: measured, out of memory (``oom``), or skipped for a reason."""

    task: Task
    measured: Measured | None = None
    oom: bool = False
    skipped: str = ""


def absence(point: Point | None) -> str:
    """Why a cell of a table holds no number."""
    return EMPTY if point is None else FULL if point.oom else SKIPPED


@dataclass(frozen=True, kw_only=True)
class Results:
    """A report's raw content.

    Attributes:
        request: the options of the run, except where to write.
        environment: versions, machine and commit.
        paper: whether the networks have the size of the paper's networks.
        rates: how fast the machine copies and multiplies, measured in the same run.
        complete: whether every point has an outcome.
    """

    format: int = FORMAT
    request: dict[str, Any]
    environment: dict[str, str]
    series: tuple[Series, ...]
    paper: bool
    rates: Rates
    points: tuple[Point, ...] = ()
    complete: bool = False

    def with_point(self, point: Point) -> Results:
        return replace(self, points=(*self.points, point))

    def find(self, series: str, what: What, context: int, variant: str = "") -> Point | None:
        """The point of a task, if it has an outcome."""
        task = Task(series=series, what=what, context=context, variant=variant)
        return next((point for point in self.points if point.task == task), None)

    def measured(self, series: str, what: What, context: int, variant: str = "") -> Measured | None:
        point = self.find(series, what, context, variant)
        return None if point is None else point.measured

    def measured_points(self, what: What) -> Iterator[tuple[Series, Point, Measured]]:
        """The points of a kind that have figures, series by series."""
        for one in self.series:
            for point in self.points:
                if point.task.series == one.label and point.task.what == what and point.measured is not None:
                    yield one, point, point.measured

    def limit_ms(self, found: Measured) -> float:
        """The least time that the machine could take."""
        return self.rates.ms(Cost(bytes=found.bytes, flops=found.flops))

    @property
    def contexts(self) -> list[int]:
        return sorted({point.task.context for point in self.points})


def save(results: Results, folder: Path) -> Path:
    """Write the results. After a crash the file holds the previous ones."""
    content = json.dumps(to_dict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(folder / RESULTS, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def read(file: Path) -> Results:
    """The results in a file.

    Raises:
        UserError: when there is no such file, or it holds no results.
    """
    return from_dict(Results, _raw(file), file)


def _raw(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if "rates" not in found or "points" not in found:
        raise UserError(f"{file} was not written by mmmamba bench")
    return found


def earlier(
    folder: Path, request: Mapping[str, Any], environment: Mapping[str, str], *, resume: bool, overwrite: bool
) -> Results | None:
    """The results in ``folder`` to resume; None to begin from nothing.

    Raises:
        UserError: when the folder is a file, holds something else, holds a report and neither ``resume`` nor
            ``overwrite`` is given, or one that cannot be resumed (another request, another machine).
    """
    if resume and overwrite:
        raise UserError("--resume keeps what is there and --overwrite replaces it: pass one of them")
    file = folder / RESULTS
    if not file.is_file():
        if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise UserError(f"{folder} holds files that are no report of mmmamba bench; choose another --report")
        return None
    found = _raw(file)
    if overwrite:
        return None
    if not resume:
        raise UserError(f"{folder} holds a report; pass --resume to continue it, or --overwrite to replace it")
    results = from_dict(Results, found, file)
    if "cuda" in environment:  # a GPU may be in another host later; its times do not depend on the host's kernel
        environment = {**environment, "platform": results.environment.get("platform", "")}
    for name, ours, theirs in (
        ("request", request, results.request),
        ("machine or version", environment, results.environment),
    ):
        different = _first_difference(to_dict(ours), theirs)
        if different:
            raise UserError(f"{file} was made with another {name} ({different}); pass --overwrite to replace it")
    return results


def _first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    keys: Sequence[str] = [*ours, *(key for key in theirs if key not in ours)]
    return next(
        (f"{key}: {theirs.get(key)}, now {ours.get(key)}" for key in keys if ours.get(key) != theirs.get(key)), ""
    )
