"""The main job at a laptop's size, with one command and one page at its end."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba.ablation.experiment import logged
from mmmamba.ablation.schedule import workers
from mmmamba.checkpoints import builtin_names
from mmmamba.config_files import load_yaml, to_dict
from mmmamba.distill.distill import distill, seeded
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.distill.stages import ALIGNMENT
from mmmamba.distill.training_data import prepare_root
from mmmamba.errors import UserError
from mmmamba.evaluation.aggregate import Report, Row, assemble
from mmmamba.evaluation.evaluate import environment_of, layers_of
from mmmamba.evaluation.predict import answer, load_model
from mmmamba.evaluation.report import write_report
from mmmamba.evaluation.statistics import Interval
from mmmamba.evaluation.suite import nano_suite
from mmmamba.evaluation.webpage import pick_examples, write_html
from mmmamba.jobs import Job, run_jobs
from mmmamba.jsonfile import parse
from mmmamba.locks import LOCK, alone_in
from mmmamba.outputs import LEDGER, Ledger, check_folder
from mmmamba.progress import Terminal
from mmmamba.report import table
from mmmamba.report.number_format import percent

DATA = Path("data/nano")
ABILITIES = ("easy", "read", "count", "relate", "absent", "text", "recall-1x", "recall-4x")
TEACHER = "pico-teacher"
STUDENTS = {"linear": "pico-linear", "hybrid": "pico-hybrid"}
SHIPPED = {"nano teacher": "nano-teacher", "nano linear": "nano-linear", "nano hybrid": "nano-hybrid"}
STEPS = (
    "make the data",
    "align the mixers (stages 1 and 2)",
    "match the teacher's answers (stage 3)",
    "ask all models the same questions",
)
PROCESSES = 2  # a training step is too small for two threads: two processes of one thread each do half as much again

VERB, PAGE, LOGS = "demo", "report.html", "logs"
#: All that a demo leaves in its folder; the last two are of earlier versions.
PARTS = (
    "aligned", "control", "evaluation", LOGS, *STUDENTS.values(), PAGE, LEDGER, LOCK, "pico-linear.log",
    "pico-hybrid.log",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long a demo is.

    Attributes:
        changes: student → what is changed in its recipe.
        limit: questions per ability.
        nano: whether the larger models that the package ships are asked too.
    """

    changes: Mapping[str, tuple[str, ...]]
    limit: int
    nano: bool


OPEN_GATE = "mixer.gate_bias=true"  # it starts at a lower loss, which counts where the steps are few
SHORT = Size(
    changes={"linear": (OPEN_GATE, "stage3.steps=1000", "stage3.lr=3e-3"), "hybrid": (OPEN_GATE, "stage3.steps=800")},
    limit=100,
    nano=False,
)
LONG = Size(changes={"linear": (), "hybrid": ()}, limit=200, nano=True)


def demo(
    *, out: Path | None = None, long: bool = False, limit: int | None = None, fresh: bool = False, device: str = "auto"
) -> Path:
    """Run the whole job on this machine: data, seeding, three stages, evaluation, one report.

    Example: mmmamba demo

    A small softmax teacher (pico, about 1 M parameters, part of the package) becomes a linear and a hybrid state space
    model in less than ten minutes on two CPU cores. All are then asked questions that they have never seen: the
    teacher, both students, a control that was seeded but not distilled, and the teacher without its pictures. An
    interrupted demo goes on where it stopped.

    With --long the students are distilled for as many steps as the recipes pico-linear and pico-hybrid say, twice as
    many questions are asked, and the larger nano models of the package are asked too. That takes about twenty-five
    minutes.

    Args:
        out: folder of the runs, the control, the logs and the report (default: runs/demo, or runs/demo-long).
        long: more steps, more questions, more models.
        limit: questions per ability (default: 100, or 200 with --long).
        fresh: throw away what an earlier demo left in that folder.
        device: auto, cpu, cuda, ….

    Returns:
        the path of report.html.
    """
    began = time.monotonic()
    folder = out or Path("runs") / ("demo-long" if long else "demo")
    size = LONG if long else SHORT
    check_folder(folder)
    with alone_in(folder):
        _check_own(folder)
        if fresh:
            _remove(folder)
        return _Demo(folder, size, limit or size.limit, device).run(began)


def _check_own(out: Path) -> None:
    """Refuse a folder that holds anything but a demo."""
    for entry in sorted(out.iterdir()):
        run = entry.name in ("aligned", *STUDENTS.values())
        if entry.name not in PARTS or entry.is_symlink() or (run and not (entry / "manifest.json").is_file()):
            raise UserError(f"{out}: holds '{entry.name}', which is no part of a demo; give another --out")
    if any(out.glob("*/manifest.json")) and not (out / LEDGER).exists():
        return  # a demo of an earlier version
    Ledger(out, VERB).check([PAGE], otherwise="give another --out")


def _remove(out: Path) -> None:
    """Throw away the parts of a demo, which :func:`_check_own` has seen to be all that is there."""
    for name in PARTS:
        if name == LOCK:
            continue
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)


class _Demo:
    """A demo, alone in its folder."""

    def __init__(self, out: Path, size: Size, limit: int, device: str) -> None:
        self.out, self.size, self.limit, self.device = out, size, limit, device
        self.recipes = {
            student: load_recipe(DistillRecipe, name, size.changes[student]) for student, name in STUDENTS.items()
        }
        for student, name in STUDENTS.items():
            kept = out / name / "recipe.yaml"
            if kept.is_file() and load_yaml(kept) != to_dict(self.recipes[student]):
                raise UserError(
                    f"{out}: holds a demo of another length or version; pass --fresh to begin again, or another --out"
                )

    def run(self, began: float) -> Path:
        console = Terminal(stderr=True)
        console.print(f"what each job says is in {self.out / LOGS}")
        with workers(PROCESSES, self.device) as executor:
            results = run_jobs(self.jobs(), STEPS, executor, PROCESSES, console)
        report = self._report([found for name, found in results.items() if name.startswith("ask ")])
        write_report(report, self.out / "evaluation")
        table.show(summary_of(report))
        Ledger(self.out, VERB).write({PAGE: functools.partial(self._write_page, report)})
        console.print(f"{(time.monotonic() - began) / 60:.1f} minutes")
        page = self.out / PAGE
        print(f"report: {page}")
        return page

    def jobs(self) -> list[Job]:
        """All jobs, in the order in which they should start."""
        linear = self.recipes["linear"]
        align = linear.stage1.steps + linear.stage2.steps
        jobs = [
            self._job("data", 0, 25, prepare_root, linear.data),
            self._job(
                "alignment", 1, 20 + 0.18 * align, distill, STUDENTS["linear"], out=self.out / "aligned", resume=True,
                set=(*self.size.changes["linear"], "stage3.steps=0"), device=self.device,
                needs=("data",), watch=_watch(self.out / "aligned", {n: linear.stages[n].steps for n in ALIGNMENT}),
            ),
            self._ask("teacher", TEACHER, against=None),
            self._ask("blind", TEACHER, against="teacher", blind=True),
            self._ask("seeded only", None, against="teacher"),
        ]  # fmt: skip
        for student, name in STUDENTS.items():
            steps = self.recipes[student].stage3.steps
            jobs.append(
                self._job(
                    student, 2, 10 + 0.38 * steps, distill, name, out=self.out / name, resume=True,
                    set=self.size.changes[student], device=self.device,
                    needs=("alignment",), watch=_watch(self.out / name, {"stage3": steps}),
                )
            )  # fmt: skip
        jobs += [self._ask(student, self.out / name / "model", against="teacher", after=student)
                 for student, name in STUDENTS.items()]  # fmt: skip
        return jobs + [
            self._ask(label, name, against=None if name == "nano-teacher" else "nano teacher", seconds=0.6)
            for label, name in SHIPPED.items()
            if self.size.nano and name in builtin_names()
        ]

    def _job(
        self, name: str, step: int, seconds: float, call: Callable[..., Any], *arguments: Any,
        needs: Sequence[str] = (), watch: Callable[[], tuple[float, str]] | None = None, **options: Any,
    ) -> Job:  # fmt: skip
        log = self.out / LOGS / f"{name.replace(' ', '-')}.log"
        work = functools.partial(_apart, log, functools.partial(call, *arguments, **options))
        return Job(name=name, step=step, call=work, log=log, seconds=seconds, needs=tuple(needs), watch=watch)

    def _ask(
        self, label: str, model: str | Path | None, *, against: str | None, blind: bool = False, after: str = "data",
        seconds: float = 0.2,
    ) -> Job:  # fmt: skip
        """Ask a model: a built-in one, one from a folder, or, for None, the control. ``seconds``: for a question."""
        return self._job(
            f"ask {label}", 3, 4 + seconds * self.limit, _asked, label, model or self.out / "control", self.limit,
            against=against, blind=blind, seed=None if model else STUDENTS["linear"],
            changes=self.size.changes["linear"], device=self.device, needs=(after,),
        )  # fmt: skip

    def _report(self, found: Sequence[tuple[Row, dict[str, str]]]) -> Report:
        """One report of all that was asked, in the order of the tables."""
        order = ["teacher", *STUDENTS, "seeded only", *SHIPPED, "blind"]
        rows = sorted((row for row, _ in found), key=lambda row: order.index(row.label))
        request = {"models": {row.label: row.path for row in rows}, "limit": self.limit, "device": self.device}
        suite = nano_suite(DATA, limit=self.limit, abilities=ABILITIES)
        return assemble(suite, rows, seed=0, request=request, environment=found[0][1])

    def _write_page(self, report: Report, page: Path) -> Path:
        runs = [self.out / name for name in ("aligned", *STUDENTS.values())]
        labels = {row.label for row in report.models}
        shipped = ", ".join(label for label in SHIPPED if label in labels)
        steps = ", ".join(f"{student} {recipe.stage3.steps:,}" for student, recipe in self.recipes.items())
        notes = [
            f"linear and hybrid were distilled here, from the pico teacher; steps of stage 3: {steps}. “seeded only” "
            "is the linear student before any distillation, and blind the teacher with grey pictures.",
            f"Made on a GPU and part of the package: {shipped}. See docs/results/nano.md." if shipped else
            "Larger students that were distilled on a GPU keep 99 % of their teacher; mmmamba demo --long asks them "
            "too, and docs/results/nano.md has their figures.",
            "Every question is about pictures, words and scenes that were never trained on; recall-4x is four times as "
            "long as anything that linear and hybrid were distilled on.",
            f"{self.limit} questions an ability; the brackets are 95 % intervals.",
        ]  # fmt: skip
        return write_html(
            page,
            title="mmmamba demo",
            summary="A softmax teacher became a linear and a hybrid state space model here. How much did they keep?",
            report=report,
            curves={run.name: run / "metrics.jsonl" for run in runs[1:]},
            examples=pick_examples(report, 12),
            notes=notes,
        )


def summary_of(report: Report) -> table.Table:
    """The means over all abilities, as few columns as any terminal holds."""

    def cell(value: Interval | None) -> str:
        return "" if value is None else f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"

    return table.Table(
        title="Means over all abilities, in per cent, with 95 % intervals; the report has each ability",
        columns=["model", "right", "beside", "kept of its score"],
        rows=[
            [model.label, cell(model.mean.score), model.against or "", cell(model.retention)] for model in report.models
        ],
    )


def _apart(log: Path, call: Callable[[], Any]) -> Any:
    """A job's work, in a process of its own, that says what it has to say to a log."""
    with logged(log):
        return call()


def _asked(
    label: str, model: str | Path, limit: int, *, against: str | None, blind: bool, seed: str | None,
    changes: tuple[str, ...], device: str,
) -> tuple[Row, dict[str, str]]:  # fmt: skip
    """What a model answers, and on what machine. ``seed``: the recipe of which ``model`` is first made."""
    path = seeded(seed, set=changes, out=Path(model)) if seed else model
    loaded = load_model(path, device=device)
    answers = answer(loaded, nano_suite(DATA, limit=limit, abilities=ABILITIES), blind=blind)
    row = Row(
        label=label, path=str(path), layers=layers_of(loaded), answers=answers, against=against, blind=blind
    )  # fmt: skip
    return row, environment_of(loaded)


def _watch(run: Path, stages: Mapping[str, int]) -> Callable[[], tuple[float, str]]:
    """How far a run is in some of its stages, by what it logged last: the share, and steps and loss in words.

    Args:
        run: the run folder, there or not.
        stages: the steps of each stage, in order.
    """

    def look() -> tuple[float, str]:
        last = _last_line(run / "metrics.jsonl")
        if last.get("stage") not in stages:
            return 0.0, ""
        names = list(stages)
        before = sum(stages[name] for name in names[: names.index(last["stage"])])
        whole = sum(stages.values())
        return (before + last["step"]) / max(whole, 1), f"{before + last['step']}/{whole}, loss {last['loss']:.3g}"

    return look


def _last_line(file: Path) -> dict[str, Any]:
    """The last whole line of a log of JSON lines; empty where there is none yet."""
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 2000))
        lines = stream.read().split(b"\n")[:-1]
    try:
        found = parse(lines[-1]) if lines else {}
    except ValueError:  # cut by the seek, or damaged: the run itself will tell
        return {}
    return found if isinstance(found, dict) else {}
