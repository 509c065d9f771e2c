"""The ``ablate`` verb: distil and evaluate every cell of a table file, and write tables and pages of the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmmamba.ablation.experiment import Setting, forget, prepare
from mmmamba.ablation.journal import RESULTS, Journal, Result, Results, read
from mmmamba.ablation.journal import merge as merge_files
from mmmamba.ablation.plan import Cell, Plan, cells_of, load_plan, overlaid, select
from mmmamba.ablation.report import check_page, check_report, fill, write_report
from mmmamba.ablation.schedule import Unit, run, shard, units
from mmmamba.checkpoints import resolve
from mmmamba.device import MOST_WORKERS, pick_device
from mmmamba.errors import UserError
from mmmamba.locks import alone_in
from mmmamba.outputs import check_folder


def ablate(
    table: str,
    *,
    out: Path | None = None,
    only: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    shard: str | None = None,
    jobs: int = 1,
    list: bool = False,
    report: bool = False,
    merge: tuple[Path, ...] = (),
    into: tuple[Path, ...] = (),
    set: tuple[str, ...] = (),
    steps_scale: float = 1.0,
    keep: bool = False,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Path:
    """Find out what matters in a recipe: distil every cell of a table, ask every student, compare over seeds.

    Example: mmmamba ablate nano-ablation --only placement --jobs 2

    A table file names cells and seeds. A cell is a few changes to a recipe. Every cell is one distillation and one
    evaluation against its teacher, and adds one line to OUT/results.jsonl: the changes, what the student keeps by
    ability, losses, seconds, machine, and two commands that repeat it. Tables, plots and verdicts with 95 % intervals
    over seeds are made from these lines alone.

    Run the same command again to continue. Finished cells are recognised by a hash of everything that decides their
    result, and a cell that was killed continues from its last checkpoint. Work that cells share is done once: the data,
    the teacher's answers, stages 1 and 2 of cells with the same alignment, and the whole run of identical cells.

        mmmamba ablate nano-ablation --list                       # what would run, and the commands of each cell
        mmmamba ablate nano-ablation --steps-scale 0.01 --seeds 0 # a quick look, in a separate folder
        mmmamba ablate nano-ablation --shard 1/2                  # half of it here, --shard 2/2 on another machine
        mmmamba ablate nano-ablation --merge runs/nano-ablation-shard2of2/results.jsonl
        mmmamba ablate nano-ablation --report --into docs/results/nano.md

    Args:
        table: a table file, or the name of a built-in one.
        out: the folder of results, tables, logs and unfinished runs (default: runs/NAME, with a suffix for --shard and
            --steps-scale).
        only: these tables or cells only, such as --only stages --only placement/tail-stacked.
        seeds: these seeds only.
        shard: run only part K/N, such as 2/8, to split the work over several commands or machines; join the results
            with --merge.
        jobs: cells at a time, each in a separate process, since small models do not fill a GPU. They are spread over
            all GPUs, unless --device names one.
        list: print what would run, with steps and commands, and run nothing.
        report: write tables, plots and pages from the results so far, and run nothing.
        merge: add the lines of these results files, and run nothing.
        into: Markdown pages whose marked blocks are filled again; results and plots are copied to the page's folder.
        set: recipe keys to change in every cell that does not change them itself, e.g. --set data.root=data/nano.
        steps_scale: factor on the steps of every stage, for a quick look.
        keep: leave the runs of finished cells in OUT/runs instead of removing them.
        device: auto, cpu, cuda, cuda:1, ….
        precision: of the distillation: fp32, or bf16 passes over fp32 weights; auto picks bf16 on a GPU.

    Returns:
        the results file.
    """
    plan, where = load_plan(table)
    plan = overlaid(plan, set)
    if not 1 <= jobs <= MOST_WORKERS:
        raise UserError(f"--jobs must be from 1 to {MOST_WORKERS}, got {jobs}")
    runs_none = "--merge" if merge else "--report" if report else ""
    if runs_none and (list or only or seeds):
        raise UserError(f"{runs_none} runs no cell: it goes without --list, --only and --seeds")
    cells = cells_of(plan, where, steps_scale=steps_scale)
    todo = _chosen(cells, only, seeds, shard)
    folder = out if out is not None else Path("runs") / _folder_name(plan, shard, steps_scale)
    file = folder / RESULTS
    for page in into:
        check_page(page, plan)  # report a mistake in a page before hours of work
    if list:
        _print_list(todo, read(file), pick_device(device).type if device == "auto" else device.partition(":")[0])
        return file
    setting = Setting(out=folder, device=device, precision=precision, steps_scale=steps_scale, keep=keep)
    failed: dict[str, str] = {}
    check_folder(folder)
    with alone_in(folder):
        check_report(plan, folder)
        if merge:
            new = merge_files(file, merge)
            print(f"{new} cells taken over from {len(merge)} file{'s' * (len(merge) > 1)}", file=sys.stderr)
        journal = Journal(file)
        journal.note_plan(plan, steps_scale)
        journal.rename(cells)
        if not runs_none:
            failed = _run(todo, setting, jobs, journal)
        write_report(journal.results, folder)
    for page in into:
        fill(page, journal.results, file)
    print(file)
    if failed:
        name, reason = next(iter(failed.items()))
        more = f" ({len(failed)} cells failed; {folder / 'logs'} has the others' reasons)" if len(failed) > 1 else ""
        raise UserError(f"{name}: {reason}{more}")
    return file


def _chosen(cells: Sequence[Cell], only: tuple[str, ...], seeds: tuple[int, ...], part: str | None) -> list[Unit]:
    """The runs that a command is about."""
    whole = units(select(cells, only, seeds))
    return whole if part is None else shard(whole, part)


def _folder_name(plan: Plan, part: str | None, steps_scale: float) -> str:
    scaled = f"-x{steps_scale:g}" if steps_scale != 1 else ""
    return plan.name + scaled + (f"-shard{part.replace('/', 'of')}" if part else "")


def _run(todo: Sequence[Unit], setting: Setting, jobs: int, journal: Journal) -> dict[str, str]:
    """Bring the journal up to date with ``todo``; cell → reason of what failed."""

    def write(unit: Unit, result: Result) -> None:
        for cell in unit.cells:
            if journal.find(cell) is None:
                journal.add(result.of(cell))
        if not setting.keep:
            forget(unit.first, setting)

    left = []
    for unit in todo:
        known = journal.same(unit.first)
        if known is None:
            left.append(unit)
        else:  # perhaps under other names
            for cell in unit.cells:
                if journal.find(cell) is None:
                    journal.add(known.of(cell))
    finished = len(todo) - len(left)
    print(f"{len(todo)} runs: {finished} finished, {len(left)} to go; logs: {setting.out / 'logs'}", file=sys.stderr)
    if not left:
        return {}
    for teacher in {unit.first.recipe.teacher for unit in left}:
        resolve(teacher)
    prepare([unit.first for unit in left], setting)
    return run(left, setting, jobs, write)


def _print_list(todo: Sequence[Unit], found: Results, kind: str) -> None:
    known = {result.id for result in found.cells}
    total = 0
    aligned: set[str] = set()
    for unit in todo:
        cell = unit.first
        shared = cell.alignment in aligned and cell.aligning > 0
        done = cell.id in known
        total += 0 if done else sum(cell.steps) - (cell.aligning if shared else 0)
        aligned.add(cell.alignment)
        print(
            f"{', '.join(map(str, unit.cells))}: {' + '.join(f'{n:,}' for n in cell.steps)} steps"
            f"{', stages 1 and 2 shared' if shared else ''}{', finished' if done else ''}"
        )
        for command in cell.commands(kind):
            print(f"    {command}")
    left = sum(unit.first.id not in known for unit in todo)
    print(f"{sum(len(unit.cells) for unit in todo)} cells, {len(todo)} runs, {left} to go: {total:,} steps")
