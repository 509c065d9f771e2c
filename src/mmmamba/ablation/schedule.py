"""Decide which cells run here, in which order and how many at once: shared work first, one process per job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from mmmamba.ablation.experiment import Setting, align, measure
from mmmamba.ablation.journal import Result
from mmmamba.ablation.plan import Cell
from mmmamba.device import cores
from mmmamba.errors import UserError
from mmmamba.progress import Progress, Terminal


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Cells with the same run under several names; the run of the first one is made."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        return self.cells[0]


_Task = tuple[Unit | None, list[Unit]]  # a unit to measure; or None, and the units to align for


def units(cells: Sequence[Cell]) -> list[Unit]:
    """The runs of ``cells``, each once: those with one alignment in a row, otherwise in the given order."""
    by_id: dict[str, list[Cell]] = {}
    for cell in cells:
        by_id.setdefault(cell.id, []).append(cell)
    groups: dict[str, list[Unit]] = {}
    for same in by_id.values():
        groups.setdefault(same[0].alignment, []).append(Unit(cells=tuple(same)))
    return [unit for group in groups.values() for unit in group]


def shard(whole: Sequence[Unit], text: str) -> list[Unit]:
    """Part K of N ("K/N") of the runs. All parts have about as many steps, and few alignments are needed in two parts.

    The parts depend only on ``whole``, so those of several commands are disjoint and complete.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {text}: must be K/N with K from 1 to N, such as 2/8")
    costs = []
    seen: set[str] = set()
    for unit in whole:
        shared = unit.first.aligning if unit.first.alignment in seen else 0
        costs.append(1 + sum(unit.first.steps) - shared)
        seen.add(unit.first.alignment)
    ends = [sum(costs[: i + 1]) for i in range(len(costs))]
    return [
        unit for unit, cost, end in zip(whole, costs, ends, strict=True)
        if int((end - cost / 2) / ends[-1] * int(count)) == int(number) - 1
    ]  # fmt: skip


def run(todo: Sequence[Unit], setting: Setting, jobs: int, done: Callable[[Unit, Result], None]) -> dict[str, str]:
    """Measure every unit, ``jobs`` at a time, each in a separate process (one job: in this process).

    Stages 1 and 2 that several units share are run first, once, and their units follow. ``done`` is called here, in
    this process, with each result as it comes. A cell that fails (its loss left the finite, say) stops no other.

    Returns:
        cell → reason of those that failed.
    """
    groups: dict[str, list[Unit]] = {}
    for each in todo:
        groups.setdefault(each.first.alignment, []).append(each)
    ready: deque[_Task] = deque()
    for group in groups.values():
        if len(group) > 1 and group[0].first.aligning:
            ready.append((None, group))
        else:
            ready.extend((alone, []) for alone in group)
    running: dict[Future[Any], _Task] = {}
    failed: dict[str, str] = {}
    # The stream as it is now: while a cell runs in this process, sys.stderr is its log.
    console = Terminal(file=sys.stderr)
    with workers(jobs, setting.device) as executor, Progress("cells", len(todo), console=console) as bar:
        while ready or running:
            while ready and len(running) < jobs:
                task = unit, group = ready.popleft()
                work = partial(align, group[0].first) if unit is None else partial(measure, unit.first)
                running[executor.submit(work, setting)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit, group = running.pop(future)
                try:
                    result = future.result()
                except UserError as error:
                    for lost in group if unit is None else [unit]:
                        failed[str(lost.first)] = str(error)
                        bar.advance()
                    continue
                except BrokenProcessPool as error:
                    names = ", ".join(str(u.first) for u, _ in [(unit, group), *running.values()] if u is not None)
                    raise UserError(f"a process died (out of memory?) while it ran one of: {names or 'alignments'}; "
                                    f"see {setting.out / 'logs'}, try fewer --jobs, and run the same command to go on"
                                    ) from error  # fmt: skip
                if unit is None:  # first, so that a machine finishes what it has begun
                    ready.extendleft((follower, []) for follower in reversed(group))
                else:
                    done(unit, result)
                    bar.advance(cell=str(unit.first))
    return failed


class _Here(Executor):
    """Runs what is submitted immediately, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except UserError as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def workers(jobs: int, device: str) -> Iterator[Executor]:
    """An executor of ``jobs`` calls at once, each in a separate process with its share of the cores (one job: here).

    If ``device`` names no GPU by number, the processes are spread over all GPUs, and each process sees only one. They
    end when this process ends, however it ends, and may start processes of their own to load data.
    """
    if jobs == 1:
        yield _Here()
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    gpus = context.SimpleQueue()
    for job in range(jobs):
        gpus.put(_gpu(job, device))
    given = (max(1, cores() // jobs), multiprocessing.get_start_method(), gpus)
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=given)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        # Their runs continue from the last checkpoint when the command is run again.
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _gpu(job: int, device: str) -> str | None:
    """The GPU of a process, as CUDA_VISIBLE_DEVICES names it; None where there is nothing to choose."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count < 2:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[job % count]


def _begin(threads: int, start_method: str, gpus: SimpleQueue[str | None]) -> None:
    """Set up a worker: only the parent answers an interrupt, and a worker must not outlive a parent that was killed."""
    if (gpu := gpus.get()) is not None:  # before CUDA starts, which reads it once
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # A spawned process would spawn its loaders too, and send each a copy of the data that forked ones share.
    multiprocessing.set_start_method(start_method, force=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
