"""Jobs that need one another, and the line that says how far they are."""

from __future__ import annotations

import io
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmmamba import jobs
from mmmamba.errors import UserError
from mmmamba.jobs import Job, run_jobs, time_left
from mmmamba.progress import Terminal


def job(name: str, call: Any = None, **options: Any) -> Job:
    given: dict[str, Any] = {"step": 0, "seconds": 10.0, "log": Path(f"{name}.log"), **options}
    return Job(name=name, call=call or partial(str, name), **given)


def run(*todo: Job, console: Terminal | None = None) -> dict[str, Any]:
    with ThreadPoolExecutor(2) as executor:
        return run_jobs(todo, ("first", "second"), executor, 2, console or Terminal(quiet=True))


def test_a_job_begins_when_what_it_needs_has_ended() -> None:
    seen: list[str] = []
    found = run(
        job("c", partial(seen.append, "c"), needs=("a", "b")), job("a", partial(seen.append, "a")),
        job("b", partial(seen.append, "b"), needs=("a",)), job("d"),
    )  # fmt: skip
    assert seen == ["a", "b", "c"]
    assert found == {"a": None, "b": None, "c": None, "d": "d"}


def test_a_job_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="b needs a, which is no job"):
        run(job("b", needs=("a",)))


def test_two_jobs_run_at_a_time() -> None:
    both = threading.Barrier(2, timeout=30)
    run(job("a", both.wait), job("b", both.wait))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no such file"), "b failed: no such file"),
        (BrokenProcessPool(), "b failed: its process died .*b.log"),
    ],
)
def test_a_failure_names_its_job(error: Exception, said: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(UserError, match=said):
        run(job("a"), job("b", fail, needs=("a",)))


def test_the_time_left_follows_the_plan() -> None:
    waiting = [job("a", seconds=40), job("b", seconds=20), job("c", seconds=10, needs=("b",))]
    assert time_left({"x": 5.0}, waiting, 1.0, 2) == 40  # a; beside it x, b and c
    assert time_left({"x": 5.0}, waiting, 2.0, 2) == 80
    assert time_left({}, waiting, 1.0, 1) == 70


def test_the_pace_counts_what_was_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])
    share = [0.5]  # done before: a job that is resumed
    running = jobs._Running(job("a", seconds=100, watch=lambda: (share[0], "half")))
    whole = jobs.Whole(("first",), Terminal(quiet=True))

    def pace(seconds: float, done: float) -> float:
        clock[0], share[0] = seconds, done
        running.look()
        return whole.pace([running])

    assert pace(60.0, 0.5) == 1  # it loads
    assert pace(70.0, 0.6) == 1  # the first progress
    assert pace(130.0, 0.8) == pytest.approx((60 + jobs.TRUST) / (20 + jobs.TRUST))  # 60 seconds for 20 planned ones
    assert running.left(3.0) == pytest.approx(60)
    whole.note_end(running)
    assert whole.pace([]) == whole.pace([jobs._Running(job("b"))]) == pytest.approx(90 / 50)


def test_a_log_gets_a_line_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "INTERVAL", 1e9)
    log = io.StringIO()
    run(job("a"), job("b", step=1, needs=("a",), watch=lambda: (0.5, "20/40")), console=Terminal(file=log, width=200))
    lines = log.getvalue().splitlines()
    assert lines[0] == "step 1 of 2: first (a); 0:00 passed, about 0:20 left"
    assert lines[1] == "step 2 of 2: second (b 20/40); 0:00 passed, about 0:05 left"
    assert len(lines) == 2


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    console = Terminal(file=screen, force_terminal=True, width=200)
    ended: Future[None] = Future()
    threading.Timer(0.3, ended.set_result, [None]).start()
    run(job("a", ended.result, watch=lambda: (0.5, "20/40")), console=console)
    assert "step 1 of 2: first" in screen.getvalue() and "about 0:05 left  a 20/40" in screen.getvalue()
