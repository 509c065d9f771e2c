"""Locks: one process at a time works in a folder, or with a file. The system frees the lock of a process that dies.

A lock is a file that names the process that holds it (``.lock`` in a folder, ``.NAME.lock`` beside a file). It is
removed at the end. What counts is that the system holds the file locked, not that it exists. So a file that a killed
process left behind blocks nothing. The locks are POSIX record locks, not ``flock``: forked loader processes do not
inherit them, so they block nobody if they live a moment longer than the run. On Windows, and on file systems without
such locks, nothing is locked.
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
_PAUSE = 0.1  # seconds between two tries while waiting
_TRIES = 100  # other processes may remove their locks at that moment
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# The locks of this process. The system would never lock a process out of its own locks.
_held: set[str] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def alone_in(folder: Path, option: str = "--out", *, wait: bool = False) -> Iterator[None]:
    """Let only this process work in ``folder``. The folder is made; if it stays empty, it is removed again.

    Args:
        folder: where a run, a report or data is written.
        option: the option that a user changes to work in another folder.
        wait: wait for another process instead of refusing.

    Raises:
        UserError: another process works there (it is named), or the folder can't be written.
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
    """Let only this process use ``file``, which need not exist. ``otherwise`` says what else a user can do.

    Raises:
        UserError: another process uses it (it is named), or nothing can be written beside it.
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
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        os.close(handle)
        with _guard:
            _held.discard(str(path))


def _take(path: Path, what: str, make: Callable[[], None]) -> int | str:
    """The open and locked file, or the process that has it. ``make`` makes the folder again if it was removed."""
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
            os.close(handle)  # its last owner has removed it in the meantime
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
