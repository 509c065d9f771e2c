"""The main job at a laptop's size, with one command and one page at its end."""

from __future__ import annotations

import functools
import shutil
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from mmmamba.ablation.experiment import logged
from mmmamba.ablation.schedule import workers
from mmmamba.checkpoints import builtin_names
from mmmamba.device import cores
from mmmamba.distill.distill import distill, seeded
from mmmamba.errors import UserError
from mmmamba.evaluation.evaluate import compare
from mmmamba.evaluation.report import write_report
from mmmamba.evaluation.suite import nano_suite
from mmmamba.evaluation.tables import print_report
from mmmamba.evaluation.webpage import pick_examples, write_html
from mmmamba.locks import LOCK, alone_in
from mmmamba.outputs import LEDGER, Ledger, check_folder
from mmmamba.progress import Terminal

DATA = Path("data/nano")
ABILITIES = ("easy", "read", "count", "relate", "absent", "text", "recall-1x", "recall-4x")
STUDENTS = {"linear": "pico-linear", "hybrid": "pico-hybrid"}
SHIPPED = {"nano teacher": "nano-teacher", "nano linear": "nano-linear", "nano hybrid": "nano-hybrid"}

VERB, PAGE = "demo", "report.html"
#: All that a demo leaves in its folder.
PARTS = (
    "aligned", "control", "evaluation", *STUDENTS.values(), *(f"{recipe}.log" for recipe in STUDENTS.values()), PAGE,
    LEDGER, LOCK,
)  # fmt: skip


def demo(*, out: Path = Path("runs/demo"), limit: int = 100, fresh: bool = False, device: str = "auto") -> Path:
    """Run the whole job on this machine: data, seeding, three stages, evaluation, one report.

    Example: mmmamba demo

    A small softmax teacher (pico, about 1 M parameters, part of the package) becomes a linear and a hybrid state space
    model on two CPU cores within twenty minutes. Both are then asked questions that they have never seen, beside the
    teacher, a control that was seeded but not distilled, the teacher without its pictures, and what the package ships
    of the larger nano models. An interrupted demo goes on where it stopped.

    Args:
        out: folder of the two runs, the control and the report.
        limit: questions per ability.
        fresh: throw away what an earlier demo left in that folder.
        device: auto, cpu, cuda, ….

    Returns:
        the path of report.html.
    """
    console = Terminal(stderr=True)
    began = time.monotonic()
    check_folder(out)
    with alone_in(out):
        _check_own(out)
        if fresh:
            _remove(out)
        return _demo(out, limit, device, console, began)


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


def _demo(out: Path, limit: int, device: str, console: Terminal, began: float) -> Path:
    """The demo, alone in its folder."""
    models: dict[str, str | Path] = {"teacher": "pico-teacher"}
    console.rule("seed, and align the mixers: stages 1 and 2, for both students")
    distill(STUDENTS["linear"], out=out / "aligned", resume=True, set=("stage3.steps=0",), device=device)
    console.rule("match the teacher's answers: stage 3")
    models.update(_stage3(out, device, console))
    models["seeded only"] = seeded(STUDENTS["linear"], out=out / "control")
    distilled = time.monotonic() - began
    console.rule("ask everyone")
    against = {label: "teacher" for label in (*STUDENTS, "seeded only")}
    for label, name in SHIPPED.items():
        if name in builtin_names():
            models[label] = name
            if name != "nano-teacher":
                against[label] = "nano teacher"
    shipped = ", ".join(label for label, name in SHIPPED.items() if name in models.values()) or "nothing"
    suite = nano_suite(DATA, limit=limit, abilities=ABILITIES)
    report = compare(models, suite, against=against, blind=["teacher"], device=device)
    write_report(report, out / "evaluation")
    print_report(report, Terminal())
    write_page = functools.partial(
        write_html,
        title="mmmamba demo",
        summary="A softmax teacher became a linear and a hybrid state space model here. How much did they keep?",
        report=report,
        curves={recipe: out / recipe / "metrics.jsonl" for recipe in STUDENTS.values()},
        examples=pick_examples(report, 12),
        notes=[
            f"linear and hybrid were distilled here, from the pico teacher, in {distilled / 60:.1f} minutes; "
            "“seeded only” is the linear student before any distillation.",
            f"Made on a GPU and part of the package: {shipped}. See docs/results/nano.md.",
            "Every question is about pictures, words and scenes that were never trained on; recall-4x is four times as "
            "long as anything that linear and hybrid were distilled on (the nano students have seen such lengths).",
        ],
    )
    Ledger(out, VERB).write({PAGE: write_page})
    page = out / PAGE
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    print(f"report: {page}")
    return page


def _stage3(out: Path, device: str, console: Terminal) -> dict[str, Path]:
    """Both students from the mixers aligned beside them, at the same time, each with its share of the cores.

    A step is so small here that two processes of one thread do half as much again as one of two threads.
    """
    here, *others = STUDENTS.values()
    logs = {recipe: out / f"{recipe}.log" for recipe in others}
    before = torch.get_num_threads()
    with workers(len(STUDENTS), device) as pool:
        running = {recipe: pool.submit(_apart, recipe, out, device, log) for recipe, log in logs.items()}
        for recipe, log in logs.items():
            console.print(f"{recipe} is distilled beside {here}; see {log}")
        torch.set_num_threads(max(1, cores() // len(STUDENTS)))
        try:
            distill(here, out=out / here, resume=True, device=device)
        finally:
            torch.set_num_threads(before)
        for recipe, future in running.items():
            try:
                future.result()
            except UserError as error:
                raise UserError(f"{recipe} failed: {error}") from error
            except BrokenProcessPool as error:
                raise UserError(f"{recipe} failed: its process died (out of memory?); see {logs[recipe]}") from error
    return {label: out / recipe / "model" for label, recipe in STUDENTS.items()}


def _apart(recipe: str, out: Path, device: str, log: Path) -> None:
    """A distillation that says what it has to say to a log."""
    with logged(log):
        distill(recipe, out=out / recipe, resume=True, device=device)
