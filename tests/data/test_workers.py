"""Processes that read ahead: the same items in order; dead, stuck or orphaned, nobody waits for ever."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import small_run
from mmmamba.data.packed_batch import Batch
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


# A process that is not forked imports everything once more.
METHODS = [
    pytest.param(method, marks=() if method == "fork" else pytest.mark.slow)
    for method in multiprocessing.get_all_start_methods()
]


def square(number: int) -> tuple[int, np.ndarray]:
    return number, np.full((number % 5, 3), number**2)


def die_at(last: int, how: int, number: int) -> int:
    if number == last:
        faulthandler.disable()
        os.kill(os.getpid(), how)
        time.sleep(60)
    return number


def fail(number: int) -> int:
    raise KeyError(f"item {number}")


def slow(number: int) -> int:
    time.sleep(60)
    return number


def children() -> set[int | None]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.parametrize("method", METHODS)
def test_in_order_whatever_starts_them(method, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", partial(multiprocessing.get_context, method))
    before = children()
    got = list(ordered(square, 3, 40, workers=2, ahead=3, receive=lambda item: (item[0], item[1] + 1)))
    assert [number for number, _ in got] == list(range(3, 40))
    assert all(values.shape == (n % 5, 3) and (values == n**2 + 1).all() for n, values in got)
    assert children() == before


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ends_and_does_not(workers):
    assert list(ordered(abs, 0, 0, workers=workers)) == []
    assert list(ordered(abs, 5, 6, workers=workers)) == [5]
    with closing(ordered(abs, 0, None, workers=workers)) as forever:
        assert [next(forever) for _ in range(50)] == list(range(50))


def test_what_was_made_ahead_is_bounded():
    made = multiprocessing.get_context("fork").RawValue("i", 0)

    def work(number: int) -> int:
        made.value = number
        return number

    with closing(ordered(work, 0, None, workers=1, ahead=3)) as items:
        assert next(items) == 0 == next(items) - 1
        time.sleep(0.3)
        assert made.value <= 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_is_killed_gives_one_line(how):
    began, before = time.monotonic(), children()
    items = ordered(partial(die_at, 5, how), 0, None, workers=2)
    with closing(items), pytest.raises(UserError, match=f"killed by {how.name}.*fewer workers.*--resume") as caught:
        list(items)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 20 and children() == before


def test_a_failure_in_a_worker_says_where():
    with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'item 0'"):
        list(ordered(fail, 0, None, workers=2))


def test_closing_does_not_wait_for_work():
    before = children()
    items = ordered(slow, 0, None, workers=2)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with closing(items), pytest.raises(KeyboardInterrupt):
        next(items)
    assert children() == before


def test_batches_travel_as_arrays():
    """A tensor would travel through shared memory, which is 64 MB in a container."""
    batch = Batch(
        input_ids=torch.arange(4)[None], labels=torch.tensor([[-100, 1, 2, -100]]),
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), tiles=torch.zeros(0, 2, 2, 3, dtype=torch.uint8), ids=["a"],
    )  # fmt: skip
    content = pickle.dumps(batch)
    assert b"torch" not in content
    again = pickle.loads(content)
    assert again.ids == ["a"] and again.real is None and again.scored.tolist() == [0, 1]
    for name in ("input_ids", "labels", "cu_seqlens", "tiles"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
        assert getattr(again, name).dtype == getattr(batch, name).dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("busy", [*(pytest.param(b, marks=pytest.mark.slow) for b in ("idle", "working")), "sending"])
def test_workers_end_with_a_parent_that_is_killed(method, busy, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, os, pathlib, sys, time
        from mmmamba.data.workers import ordered

        def work(number):
            pathlib.Path(sys.argv[3], str(os.getpid())).touch()
            time.sleep(60 if sys.argv[2] == "working" else 0)
            return bytes(1 << 22) if sys.argv[2] == "sending" else b""

        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            items = ordered(work, 0, None, workers=2)
            if sys.argv[2] != "working":
                next(items), next(items)
            print("ready", flush=True)
            os.read(0, 1) if sys.argv[2] == "idle" else list(items) if sys.argv[2] == "sending" else next(items)
    """)
    )
    (marks := tmp_path / "marks").mkdir()
    command = [sys.executable, str(script), method, busy, str(marks)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=small_run.ENVIRONMENT)
    assert parent.stdout and parent.stdout.readline() == b"ready\n"
    wait(lambda: len(list(marks.iterdir())) == 2)
    parent.kill()
    parent.communicate()
    wait(lambda: not any(alive(int(mark.name)) for mark in marks.iterdir()))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait(until, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_tiny_shared_memory_is_no_matter(tmp_path, teacher_folder, small_data):
    """As in a container: Docker gives /dev/shm 64 MB. Here it has 64 KB, and a run with workers comes to its end."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if not Path("/dev/shm").is_dir() or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        pytest.skip("no /dev/shm that could be made small here")
    plan = small_run.write_recipe(tmp_path / "plan.yaml", small_run.recipe(data__workers=2))
    run = f"exec {sys.executable} -m mmmamba distill {plan} --teacher {teacher_folder} --data {small_data} --out run"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {run}"], cwd=tmp_path, env=small_run.ENVIRONMENT, timeout=120
    )
    assert done.returncode == 0 and (tmp_path / "run" / "model" / "model.safetensors").is_file()
