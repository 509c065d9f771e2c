"""Jobs that wait for one another, run side by side in other processes, and a line that says how far all of them are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import progress

from mmmamba.errors import UserError
from mmmamba.progress import Terminal, duration

TICK = 0.5  # seconds between two looks at the running jobs
INTERVAL = 15.0  # seconds between two lines in a plain log
TRUST = 30.0  # planned seconds after which the measured pace counts as much as the plan's


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of a command's work.

    Attributes:
        name: what messages call it.
        step: which of the command's steps it belongs to, counted from 0.
        call: does the work. It runs in another process, so it must be picklable, and so must its result.
        log: where its output goes.
        seconds: how long it takes on two free cores. Only the estimate of the time left depends on it.
        needs: names of the jobs that must have ended before this one begins.
        watch: how far the job is, as a share from 0 to 1 and a few words. Without it the clock has to do.
    """

    name: str
    step: int
    call: Callable[[], Any]
    log: Path
    seconds: float
    needs: tuple[str, ...] = ()
    watch: Callable[[], tuple[float, str]] | None = None


def run_jobs(
    jobs: Sequence[Job], steps: Sequence[str], executor: Executor, count: int, console: Terminal
) -> dict[str, Any]:
    """Run all jobs, at most ``count`` at a time, each as soon as what it needs is done; earlier ones go first.

    Args:
        jobs: in the order in which they should start.
        steps: the names of the command's steps.
        executor: what runs them.
        count: how many it runs at once.
        console: where the line of progress goes.

    Returns:
        the result of each job, by name.

    Raises:
        UserError: when a job fails; the job is named, and its log where the process died.
    """
    for job in jobs:
        for name in job.needs:
            if name not in {each.name for each in jobs}:
                raise ValueError(f"{job.name} needs {name}, which is no job")
    results: dict[str, Any] = {}
    waiting = list(jobs)
    running: dict[Future[Any], _Running] = {}
    with Whole(steps, console) as whole:
        while waiting or running:
            ready = [job for job in waiting if all(name in results for name in job.needs)]
            for job in ready[: count - len(running)]:
                waiting.remove(job)
                running[executor.submit(job.call)] = _Running(job)
            whole.show([*running.values()], waiting, count)
            for future in wait(running, timeout=TICK, return_when=FIRST_COMPLETED).done:
                ended = running.pop(future)
                results[ended.job.name] = _result(future, ended.job)
                whole.note_end(ended)
    return results


def _result(future: Future[Any], job: Job) -> Any:
    try:
        return future.result()
    except UserError as error:
        raise UserError(f"{job.name} failed: {error}") from error
    except BrokenProcessPool as error:
        raise UserError(f"{job.name} failed: its process died (out of memory?); see {job.log}") from error


class _Running:
    """A job that has begun.

    Its pace is measured from its first progress on: before that it loads what it needs, and one that is resumed has
    less to do than planned.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        self.share, self.words = job.watch() if job.watch else (0.0, "")
        self.start = self.share
        self.first: tuple[float, float] | None = None  # when progress was first seen, and the share then

    def look(self) -> None:
        """Ask how far the job is."""
        if self.job.watch:
            share, self.words = self.job.watch()
            self.share = max(self.share, share)
            if self.first is None and self.share > self.start:
                self.first = time.monotonic(), self.share

    @property
    def measured(self) -> tuple[float, float]:
        """Seconds since the first progress, and the planned seconds of what was done in them."""
        if self.first is None:
            return 0.0, 0.0
        when, share = self.first
        return time.monotonic() - when, self.job.seconds * (self.share - share)

    def left(self, pace: float) -> float:
        """Seconds until it ends, where everything takes ``pace`` times as long as planned."""
        whole = self.job.seconds * pace
        if self.job.watch:
            return whole * (1 - self.share)
        return max(whole - (time.monotonic() - self.began), 0.1 * whole)


class Whole:
    """The line of the whole command: a bar on a terminal, a line at intervals in a log.

    It says which step of how many runs, what its jobs say, the time that has passed and the time that is left. The
    time left comes from the planned seconds of the jobs, times the pace that was measured so far.

    Args:
        steps: the names of the steps.
        console: where it goes.
    """

    def __init__(self, steps: Sequence[str], console: Terminal) -> None:
        self.steps, self.console = steps, console
        self.began, self.printed_at, self.printed_step = time.monotonic(), 0.0, -1
        self.took = self.planned = 0.0  # as measured of the jobs that have ended
        self.live = console.is_interactive and console.file.isatty()
        self.bar = progress.Progress(
            progress.TextColumn("{task.fields[step]}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[info]}", markup=False),
            console=console,
        )
        self.task = self.bar.add_task("", total=1.0, step="", info="")

    def __enter__(self) -> Whole:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bar.stop()

    def note_end(self, ended: _Running) -> None:
        """Count what a job took to the pace."""
        ended.look()
        took, planned = ended.measured
        self.took, self.planned = self.took + took, self.planned + planned

    def show(self, running: Sequence[_Running], waiting: Sequence[Job], count: int) -> None:
        """Draw the bar, or print a line where the step is new or the last line is old."""
        for each in running:
            each.look()
        jobs = [*(each.job for each in running), *waiting]
        step = min((job.step for job in jobs), default=len(self.steps) - 1)
        passed = time.monotonic() - self.began
        pace = self.pace(running)
        left = time_left({each.job.name: each.left(pace) for each in running}, waiting, pace, count)
        words = "; ".join(f"{each.job.name} {each.words}".rstrip() for each in running)
        title = f"step {step + 1} of {len(self.steps)}: {self.steps[step]}"
        if self.live:
            self.bar.update(self.task, completed=passed / (passed + left + 1e-9), step=title,
                            info=f"about {duration(left)} left  {words}")  # fmt: skip
        elif step != self.printed_step or time.monotonic() - self.printed_at >= INTERVAL:
            self.console.print(f"{title} ({words}); {duration(passed)} passed, about {duration(left)} left",
                               soft_wrap=True)  # fmt: skip
            self.printed_at, self.printed_step = time.monotonic(), step

    def pace(self, running: Sequence[_Running]) -> float:
        """How many seconds a planned second takes here: 1 at first, then more and more what was measured."""
        measured = [each.measured for each in running]
        took = self.took + sum(took for took, _ in measured)
        planned = self.planned + sum(planned for _, planned in measured)
        return (took + TRUST) / (planned + TRUST)


def time_left(running: Mapping[str, float], waiting: Sequence[Job], pace: float, count: int) -> float:
    """Seconds until all jobs have ended: what :func:`run_jobs` does, by the clock of the plan.

    Args:
        running: the seconds that each running job still takes.
        waiting: those that have not begun, in their order.
        pace: what a planned second takes.
        count: how many run at once.
    """
    left, later, clock = dict(running), list(waiting), 0.0
    unfinished = {*left, *(job.name for job in later)}
    while left or later:
        ready = [job for job in later if not unfinished.intersection(job.needs)]
        for job in ready[: count - len(left)]:
            later.remove(job)
            left[job.name] = job.seconds * pace
        name = min(left, key=lambda each: left[each])
        passed = left.pop(name)
        clock += passed
        left = {other: seconds - passed for other, seconds in left.items()}
        unfinished.remove(name)
    return clock
