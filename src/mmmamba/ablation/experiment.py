"""Run one cell: distil its student, ask it questions, and return its line of results."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmmamba.ablation.journal import Ability, Result
from mmmamba.ablation.plan import Cell, Questions, aligned
from mmmamba.checkpoints import fingerprint, resolve
from mmmamba.checkpoints.io import write_atomically
from mmmamba.device import pick_device, pick_precision, release
from mmmamba.distill.distill import distill
from mmmamba.distill.run_folder import digest, versions
from mmmamba.distill.training_data import prepare_root
from mmmamba.errors import UserError
from mmmamba.evaluation.aggregate import Row, assemble
from mmmamba.evaluation.predict import Answers, answer, load_model
from mmmamba.evaluation.suite import Suite, nano_suite
from mmmamba.inference.likelihood import Score
from mmmamba.jsonfile import read_json, read_lines
from mmmamba.progress import Progress
from mmmamba.report.environment import commit

ALIGNED = "aligned"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a command share.

    Attributes:
        out: its folder: ``runs/ALIGNMENT/…`` hold the runs, ``logs`` what they say, ``teachers`` their answers.
        device, precision: as ``mmmamba distill`` takes them.
        steps_scale: written into the results.
        keep: leave finished runs where they are.
    """

    out: Path
    device: str
    precision: Any = "auto"
    steps_scale: float = 1.0
    keep: bool = False

    def runs(self, cell: Cell) -> Path:
        """The folder of a cell's run, its alignment and the other cells of that alignment."""
        return self.out / "runs" / cell.alignment


def align(cell: Cell, setting: Setting) -> None:
    """Run stages 1 and 2 of a cell once for all cells of its alignment, whose runs take them over."""
    plan = aligned(cell)
    with logged(setting.out / "logs" / f"aligned-{cell.alignment}.log"):
        distill(plan.base, set=plan.set, out=setting.runs(cell) / ALIGNED, resume=True,
                device=setting.device, precision=setting.precision)  # fmt: skip
    release(pick_device(setting.device))


def measure(cell: Cell, setting: Setting) -> Result:
    """Distil a cell, or continue where a killed process left it, and ask its student."""
    run = setting.runs(cell) / cell.folder
    with logged(setting.out / "logs" / f"{cell.folder}.log"):
        resumed = run.exists()
        began = time.monotonic()
        student = distill(cell.base, set=cell.set, out=run, resume=True,
                          device=setting.device, precision=setting.precision)  # fmt: skip
        distilled = time.monotonic()
        abilities, mean = _asked(cell, student, setting)
        asked = time.monotonic()
    manifest = read_json(run / "manifest.json")
    where = pick_device(setting.device)
    release(where)
    return Result(
        table=cell.table,
        cell=cell.name,
        seed=cell.seed,
        id=cell.id,
        steps_scale=setting.steps_scale,
        base=cell.base,
        set=cell.set,
        steps=cell.steps,
        batch_sizes=cell.batch_sizes,
        losses=_losses(run, manifest),
        softmax_layers=tuple(manifest["softmax_layers"]) if "softmax_layers" in manifest else None,
        abilities=abilities,
        mean=mean,
        seconds={"distill": round(distilled - began, 1), "evaluate": round(asked - distilled, 1)},
        shared="from" in manifest["stages"]["stage2"],
        resumed=resumed,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        precision=str(pick_precision(setting.precision, where)).removeprefix("torch."),
        versions={**versions(), "commit": commit(Path(__file__).parents[3])},
        teacher={"name": cell.recipe.teacher, "sha256": manifest["teacher"]["sha256"]},
        commands=cell.commands(where.type),
    )


def forget(cell: Cell, setting: Setting) -> None:
    """Remove the run of a finished cell: its line holds the results and how to repeat it."""
    shutil.rmtree(setting.runs(cell) / cell.folder, ignore_errors=True)


def prepare(cells: list[Cell], setting: Setting) -> None:
    """Make what cells share, before any begins: the data's files and the teachers' answers."""
    for data in {digest(cell.recipe.data): cell.recipe.data for cell in cells}.values():
        prepare_root(data)
    for cell in {(cell.recipe.teacher, cell.data): cell for cell in cells}.values():
        _teacher_answers(cell, setting, ask=True)


# ---------------------------------------------------------------------------------------------- questions


def _asked(cell: Cell, student: Path, setting: Setting) -> tuple[dict[str, Ability], dict[str, float | None]]:
    """The student compared with its teacher: by ability, and the mean over the abilities that count."""
    suite = _suite(cell.questions, cell.data)
    teacher = Row(label="teacher", path="", layers="", answers=_teacher_answers(cell, setting))
    answers = answer(load_model(student, device=setting.device), suite)
    asked = Row(label="student", path="", layers="", answers=answers, against="teacher")
    report = assemble(suite, [teacher, asked], seed=cell.questions.seed, request={}, environment={})
    theirs, found = report.model("teacher").abilities, report.model("student").abilities
    abilities = {
        name: Ability(
            n=mine.n,
            accuracy=mine.score.value,
            teacher=theirs[name].score.value,
            retention=None if mine.retention is None else mine.retention.value,
            agreement=0.0 if mine.agreement is None else mine.agreement.value,
            nll=mine.nll if math.isfinite(mine.nll) else None,
        )
        for name, mine in found.items()
    }
    counted = [abilities[name] for name in cell.questions.counted]
    kept = [ability.retention for ability in counted if ability.retention is not None]
    return abilities, {
        "accuracy": sum(ability.accuracy for ability in counted) / len(counted),
        "retention": sum(kept) / len(kept) if kept else None,
    }


def _teacher_answers(cell: Cell, setting: Setting, ask: bool = False) -> Answers:
    """The teacher's answers, from their file. If there is none and ``ask`` is set, the teacher is asked first."""
    suite = _suite(cell.questions, cell.data)
    folder = resolve(cell.recipe.teacher)
    questions = [(item.sample.id, item.prompt, item.references) for item in suite.items]
    mark = digest([fingerprint(folder), questions, suite.max_new_tokens, pick_device(setting.device).type])
    path = setting.out / "teachers" / f"{mark}.json"
    if ask and not path.is_file():
        with Progress("the teacher's answers", len(suite.items)) as bar:
            said = answer(load_model(folder, device=setting.device), suite, progress=bar.advance)
        scores = {i: [score.nll, score.tokens] for i, score in said.likelihood.items()}
        content = json.dumps({"texts": said.texts, "likelihood": scores}, ensure_ascii=False)
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        release(pick_device(setting.device))
    found = read_json(path)
    answers = Answers(texts={int(i): text for i, text in found["texts"].items()})
    answers.likelihood = {int(i): Score(nll=nll, tokens=tokens) for i, (nll, tokens) in found["likelihood"].items()}
    return answers


@functools.lru_cache(maxsize=4)
def _suite(questions: Questions, data: str) -> Suite:
    return nano_suite(
        data, limit=questions.limit, abilities=questions.abilities, seed=questions.seed,
        max_new_tokens=questions.max_new_tokens,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- small things


def _losses(run: Path, manifest: dict[str, Any]) -> dict[str, float]:
    """Stage → the last logged loss, from the run that did the stage."""
    losses = {}
    for stage, facts in manifest["stages"].items():
        metrics = Path(facts.get("from", run)) / "metrics.jsonl"
        lines = read_lines(metrics) if metrics.is_file() else []
        logged = [entry for entry in lines if entry.get("stage") == stage and "loss" in entry]
        if logged:
            losses[stage] = round(logged[-1]["loss"], 6)
    return losses


@contextlib.contextmanager
def logged(log: Path) -> Iterator[None]:
    """Send everything printed inside to a file, and the reason of a failure too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            yield
        except UserError as error:
            print(f"error: {error}", file=file)
            raise
