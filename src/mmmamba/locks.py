"""One process at a time in a folder, or with a file. The system frees the lock of a process that dies, killed or not.

A lock is a file that says which process holds it (``.lock`` in a folder, ``.NAME.lock`` beside a file). It is removed
at the end. What counts is not that it is there but that the system holds it locked, so one that a killed process left
blocks nothing. The locks are POSIX record locks: processes that were forked for loading data do not inherit them, as
they would ``flock``, and keep nobody out when they outlive the run for a moment. Windows and file systems without such
locks do without.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmmamba.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_PAUSE = 0.1  # seconds between two tries of one that waits
_TRIES = 100  # while others remove their locks just then
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# The locks of this process: to the system, a process never locks itself out.
_held: set[str] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def alone_in(folder: Path, option: str = "--out", *, wait: bool = False) -> Iterator[None]:
    """Only this process works in ``folder``, which is made; one that was made and stays empty is removed.

    Args:
        folder: where a run, a report or data is written.
        option: what a user changes to work elsewhere.
        wait: wait for the other one instead of refusing.

    Raises:
        UserError: naming the process that works there; when the folder can't be written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]

    def make() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: can't be made: {error.strerror}") from error

    make()
    try:
        with _locked(folder.resolve() / LOCK, str(folder), f"give another {option}", wait, make):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty, as a rule
            for place in missing:
                place.rmdir()


@contextlib.contextmanager
def alone_with(file: Path, otherwise: str, *, wait: bool = False) -> Iterator[None]:
    """Only this process reads and writes ``file``, there or not; ``otherwise`` says what else a user can do.

    Raises:
        UserError: naming the process that uses it; when nothing can be written beside it.
    """
    real = file.resolve()
    with _locked(real.with_name(f".{real.name}{LOCK}"), str(file), otherwise, wait, lambda: None):
        yield


@contextlib.contextmanager
def _locked(path: Path, what: str, otherwise: str, wait: bool, make: Callable[[], None]) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    while True:
        handle = _take(path, what, make)
        if isinstance(handle, int):
            break
        if not wait:
            raise UserError(f"{what}: is in use by {handle}; wait for it, or {otherwise}")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have gone
            path.unlink()
        os.close(handle)
        with _guard:
            _held.discard(str(path))


def _take(path: Path, what: str, make: Callable[[], None]) -> int | str:
    """The open and locked file; or who has it. ``make`` makes its folder again where another process removed it."""
    with _guard:
        if str(path) in _held:
            return f"this process ({os.getpid()})"
        for left in reversed(range(_TRIES)):
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError as error:
                make()
                if not left:
                    raise UserError(f"{what}: can't be written: {error.strerror}") from error
                continue
            except OSError as error:
                raise UserError(f"{what}: can't be written: {error.strerror}") from error
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    holder = os.pread(handle, 200, 0).decode(errors="replace").split()
                    os.close(handle)
                    where = f" on {holder[1]}" if len(holder) > 1 and holder[1] != socket.gethostname() else ""
                    return f"another process{f' ({holder[0]}{where})' if holder else ''}"
            if _is_at(handle, path):
                break
            os.close(handle)  # of the one before, which has removed it meanwhile
        else:
            return "other processes that come and go"
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
        _held.add(str(path))
        return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
