"""Opens files that a user names. Only regular files are read, so that nothing waits for ever or reads a device."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmmamba.errors import UserError

_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
SHOWN = 300  # characters of a name in a message: a picture given as text may be megabytes long


def check_file(path: str | Path, what: str = "file", prefix: str = "") -> int:
    """The size in bytes of a regular file. Nothing is opened: opening a pipe waits, and opening a device may do things.

    Args:
        path: the file. Links are followed.
        what: what it should be ("data file"), for messages.
        prefix: the start of messages, which then end with the path. Without it, they start with the path.

    Raises:
        UserError: nothing is there; or it is a folder, a pipe, a device or a socket; or no file can have this name.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or half of a surrogate pair in the name
        raise _error(path, prefix, _reason(what, error)) from error
    return _size(found, path, prefix)


def open_file(path: str | Path, what: str = "file", prefix: str = "") -> BinaryIO:
    """Open a regular file to read bytes. What :func:`check_file` refuses is not opened.

    Raises:
        UserError: as :func:`check_file`, or the file cannot be opened.
    """
    check_file(path, what, prefix)
    try:
        # If a pipe takes the file's place right now, opening it does not wait.
        handle = os.open(path, _READ)
    except (OSError, ValueError) as error:
        raise _error(path, prefix, _reason(what, error)) from error
    try:
        _size(os.fstat(handle), path, prefix)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(
    path: str | Path, limit: int, what: str = "file", prefix: str = "", *, where: str | Path | None = None
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    A file of size 0 is not opened: some of the system's own files (``/proc``) say 0 and never end.

    Args:
        where: named in messages instead of the path.

    Raises:
        UserError: as :func:`open_file`, or the file is larger than ``limit``, or cannot be read.
    """
    named = path if where is None else where
    too_large = _error(named, prefix, f"has more than {limit:,} bytes, which is too much for such a {what}")
    try:
        found = os.stat(path)
        if _size(found, named, prefix) > limit:
            raise too_large
        if found.st_size == 0:
            return b""
        with open_file(path, what, prefix) as file:
            content = file.read(found.st_size + 1)  # Python reserves as much as is asked for
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _error(named, prefix, _reason(what, error)) from error
    if len(content) > found.st_size:
        raise _error(named, prefix, "grew while it was read")
    return content


def read_text(
    path: str | Path, limit: int, what: str = "file", prefix: str = "", *, where: str | Path | None = None
) -> str:
    """The content of a regular file as UTF-8 text, without a byte order mark.

    Raises:
        UserError: as :func:`read_bytes`, or it is not UTF-8 (the byte is named).
    """
    content = read_bytes(path, limit, what, prefix, where=where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = " (UTF-16?)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise _error(path if where is None else where, prefix, f"not UTF-8 text (byte {error.start}){hint}") from error


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """A stamp that changes when a file is written or replaced: device, inode number, size, time of change."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_part(path: str | Path, start: int, length: int, stamp: tuple[int, ...], what: str = "file") -> bytes:
    """Read ``length`` bytes from ``start`` on, from a file that was opened before and had this stamp then.

    Raises:
        UserError: the file is gone, cannot be read, or has another stamp now.
    """
    try:
        handle = os.open(path, _READ)
        try:
            content = b""
            if stamp_of(os.fstat(handle)) == stamp:
                os.lseek(handle, start, os.SEEK_SET)
                content = os.read(handle, length)
        finally:
            os.close(handle)
    except OSError as error:
        raise _error(path, "", f"{_reason(what, error)} (it was there before)") from error
    if len(content) != length:
        raise _error(path, "", "changed, or was replaced by another file, while it was in use")
    return content


def _size(found: os.stat_result, path: str | Path, prefix: str) -> int:
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    kind = next((name for test, name in kinds.items() if test(found.st_mode)), "a device")
    raise _error(path, prefix, f"is {kind}, not a file")


def _reason(what: str, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError) or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return f"no such {what}"
    return error.strerror or str(error)


def _error(path: str | Path, prefix: str, reason: str) -> UserError:
    shown = str(path) if len(str(path)) <= SHOWN else f"{str(path)[:SHOWN]}..."
    return UserError(f"{prefix}{reason}: {shown}" if prefix else f"{shown}: {reason}")
