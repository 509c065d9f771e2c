"""Runs a fuzzer's inputs in a forked process, each within bounds of time and memory, and says which one failed.

An input is a pure function of (target, seed, index). ``PYTHONPATH=tests python -m fuzz TARGET SEED INDEX`` runs one of
them alone, with its traceback.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mmmamba.errors import UserError

SECONDS = 10  # of the processor's time, that an input may take: the machine may have other work
PATIENCE = 120  # seconds after which a process that says nothing is stuck where no signal reaches
MEMORY = 512 << 20  # bytes that the process may grow by
ROOM = 4 << 30  # bytes of address space, for the machine's sake
FAILURES = 3  # after which a batch ends

Case = Callable[[random.Random, Any, Path], None]


class Hang(BaseException):
    """An input that took too long. No Exception: whoever catches those must not catch it."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: as pytest and the command name it.
        count: inputs in ``make test``; ``make test-all`` runs twenty times as many.
        seeds: what is changed, made once in an empty folder.
        case: makes an input from a random stream, in an empty folder, and gives it to the code. It returns when the
            input is taken, raises :class:`UserError` when it is refused; anything else is a failure.
        refuses: no input is taken (none is valid after the change).
    """

    name: str
    count: int
    seeds: Callable[[Path], Any]
    case: Case


@dataclass
class Outcome:
    """What became of a batch.

    Attributes:
        taken, refused: how many inputs.
        failures: index → what happened.
    """

    taken: int = 0
    refused: int = 0
    failures: dict[int, str] = field(default_factory=dict)


def stream(target: str, seed: int, index: int) -> random.Random:
    return random.Random(f"{target} {seed} {index}")


def once(target: Target, seed: int, index: int, seeds: Any, here: Path) -> bool:
    """Run one input; whether it was taken."""
    try:
        target.case(stream(target.name, seed, index), seeds, here)
    except UserError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) <= 1000, f"an unreadable message: {said!r}"
        return False
    return True


def run(target: Target, seed: int, indices: Iterable[int], seeds: Any) -> Outcome:
    """Run a batch in a process of its own."""
    outcome, current = Outcome(), -1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(target, seed, indices, seeds, writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as lines:
        rest, ended = b"", False
        while not ended and len(outcome.failures) < FAILURES:
            if not select.select([lines], [], [], PATIENCE)[0]:
                outcome.failures[current] = f"says nothing for {PATIENCE} s"
                break
            block = lines.read(1 << 16)
            ended = not block
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                kind, value = json.loads(line)
                if kind == "began":
                    current = value
                elif kind == "failed":
                    outcome.failures[current] = value
                else:
                    setattr(outcome, kind, getattr(outcome, kind) + 1)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended and code not in (0, -signal.SIGKILL) and not outcome.failures:
        outcome.failures[current] = f"the process ended with {code}"
    return outcome


def _child(target: Target, seed: int, indices: Iterable[int], seeds: Any, writer: int) -> None:
    """Never returns."""
    sys.settrace(None)  # coverage would take most of the time
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (address_space + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _hang)
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    gc.freeze()  # so that what is collected below is what inputs left, and quickly

    def say(kind: str, value: object = None) -> None:
        os.write(writer, json.dumps([kind, value]).encode() + b"\n")

    code = 1
    try:
        for index in indices:
            say("began", index)
            here = base / str(index)
            here.mkdir()
            os.chdir(here)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                taken = once(target, seed, index, seeds, here)
                signal.setitimer(signal.ITIMER_PROF, 0)
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
                assert grown <= MEMORY, f"{grown >> 20} MiB of memory"
                say("taken" if taken else "refused")
            except BaseException:
                signal.setitimer(signal.ITIMER_PROF, 0)
                say("failed", traceback.format_exc()[-6000:])
            shutil.rmtree(here, ignore_errors=True)
            gc.collect()  # an error holds what its frames held: the next input must not pay for it
        code = 0
    finally:
        os.chdir("/")
        shutil.rmtree(base, ignore_errors=True)
        os._exit(code)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s")
