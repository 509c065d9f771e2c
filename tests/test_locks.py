"""One process at a time: a second one is told which is there; one that was killed keeps nobody out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmmamba.errors import UserError
from mmmamba.locks import LOCK, alone_in, alone_with

HOLD = """
import sys, time
from pathlib import Path
from mmmamba.locks import alone_in, alone_with
take = alone_in(Path(sys.argv[2])) if sys.argv[1] == "folder" else alone_with(Path(sys.argv[2]), "wait")
with take:
    if len(sys.argv) > 3:
        import os
        if os.fork() == 0:  # as a process that loads data, which may outlive the run for a moment
            time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(kind: str, path: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, kind, str(path), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_works_there_and_a_killed_one_blocks_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    process = holder("folder", folder, "with a child")
    try:
        with pytest.raises(UserError, match=rf"{folder}: is in use by another process \({process.pid}\); .*--out"):
            with alone_in(folder):
                raise AssertionError("two are in")
        child = int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / LOCK).exists()
        with alone_in(folder):  # though its child lives on
            assert (folder / LOCK).read_text().split()[0] == str(os.getpid())
        os.kill(child, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "a" / "run" / LOCK).exists()


def test_a_file_is_locked_by_any_of_its_names(tmp_path: Path) -> None:
    file = tmp_path / "talk.session"
    (tmp_path / "link").symlink_to(file)
    process = holder("file", file)
    try:
        for name in (file, tmp_path / "link", tmp_path / "." / "talk.session"):
            with pytest.raises(UserError, match=rf"is in use by another process \({process.pid}\)"):
                with alone_with(name, "give another"):
                    pass
    finally:
        process.kill()
        process.wait()
    with alone_with(file, "give another"):
        pass
    assert not file.exists()  # a lock makes no file of its own out of it


def test_one_process_locks_itself_out_too_and_can_wait(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with alone_in(tmp_path, wait=True):
            order.append("second")

    with alone_in(tmp_path):
        with pytest.raises(UserError, match=rf"is in use by this process \({os.getpid()}\)"):
            with alone_in(tmp_path):
                pass
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_folder_that_was_made_for_nothing_goes_away(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_folder_that_vanishes_or_cannot_be_made_is_no_traceback(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a"):
        (tmp_path / "a" / LOCK).unlink()
        (tmp_path / "a").rmdir()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")):
        with pytest.raises(UserError, match="can't be made"), alone_in(place):
            pass
    with pytest.raises(UserError, match="can't be written"), alone_in(Path("/proc")):
        pass


def _count(folder: Path, file: Path, times: int) -> None:
    for _ in range(times):
        with alone_in(folder, wait=True):
            file.write_text(str(int(file.read_text()) + 1))


def test_many_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(tmp_path / "d", tmp_path / "n", 3)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "n").read_text() == "12"
