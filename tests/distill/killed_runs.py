"""Runs ``mmmamba`` command lines in forked processes, each killed by SIGKILL at a chosen moment.

Usage: python killed_runs.py < jobs.json, where jobs is a list of {"args": [...], "die": N, "lines": N}, the last two
optional: die before the Nth time that the process renames, flushes, removes or logs something; or be killed from
outside when metrics.jsonl has that many lines. One line a job is printed: what ended it (-9, 0, 2, …), and what hidden
leftovers lay in its folder then.

Forked from a process that has imported everything, a run takes a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmmamba import cli
from mmmamba.distill import distill, train_teacher
from mmmamba.distill.run_folder import RunFolder

PRELOADED = (distill, train_teacher)


class Killer:
    """Counts operations, and kills this process before one of them."""

    def __init__(self, die: int | None) -> None:
        self.die, self.count = die, 0

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, counted)


def run(args: list[str], die: int | None) -> None:
    """In the child: never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    killer = Killer(die)
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (shutil, "rmtree"), (RunFolder, "log")):
        killer.watch(owner, name)
    # The tokenizer is made from fewer texts: it takes most of a tiny teacher's time.
    train_teacher.corpus_texts = partial(train_teacher.corpus_texts, n=60)  # type: ignore[assignment]
    os._exit(cli.main(args))


def kill_at(pid: int, metrics: Path, lines: int) -> None:
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.001)


def main() -> None:
    for job in json.load(sys.stdin):
        folder = Path(job["args"][job["args"].index("--out") + 1])
        pid = os.fork()
        if pid == 0:
            run(job["args"], job.get("die"))
        if "lines" in job:
            kill_at(pid, folder / "metrics.jsonl", job["lines"])
        _, status = os.waitpid(pid, 0)
        hidden = sorted(path.name for path in folder.rglob(".*"))
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status), "hidden": hidden}), flush=True)


if __name__ == "__main__":
    main()
