"""Opening files that a user names: regular files only, so that nothing waits for ever or reads a device."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmmamba.errors import UserError

SHOWN = 300  # characters of a name in a message: a picture given as text may be megabytes long


def check_file(path: str | Path, what: str = "file", prefix: str = "") -> int:
    """The size in bytes of a regular file. Nothing is opened: opening a pipe waits, opening a device may act.

    Args:
        path: the file; links are followed.
        what: what it should be ("data file"), for the message.
        prefix: opens the message.

    Raises:
        UserError: nothing is there, or it is a folder, a pipe, a device or a socket, or no file can have this name.
    """
    try:
        return _size(os.stat(path), path, what, prefix)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte or half of a surrogate pair in the name
        raise UserError(f"{prefix}{_complaint(path, what, error)}") from error


def open_file(path: str | Path, what: str = "file", prefix: str = "") -> BinaryIO:
    """A regular file, open for reading bytes; what :func:`check_file` refuses is not opened.

    Raises:
        UserError: as :func:`check_file`, and when the file cannot be opened.
    """
    check_file(path, what, prefix)
    try:
        # Should a pipe take the file's place just now, opening it does not wait.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{prefix}{_complaint(path, what, error)}") from error
    try:
        _size(os.fstat(handle), path, what, prefix)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: str | Path, limit: int, what: str = "file", prefix: str = "") -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    A file that says it is empty is not opened: among the system's own (``/proc``) are some that never end.

    Raises:
        UserError: as :func:`open_file`; the file is larger than ``limit``, or cannot be read.
    """
    size = check_file(path, what, prefix)
    if size > limit:
        raise UserError(f"{prefix}{path}: has {size:,} bytes; a {what} may have {limit:,}")
    if size == 0:
        return b""
    with open_file(path, what, prefix) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{prefix}{path}: {error.strerror or error}") from error
    if len(content) > limit:
        raise UserError(f"{prefix}{path}: has more than the {limit:,} bytes that a {what} may have")
    return content


def read_text(path: str | Path, limit: int, what: str = "file", prefix: str = "") -> str:
    """The same as UTF-8 text, without a byte order mark.

    Raises:
        UserError: as :func:`read_bytes`; it is not UTF-8 (the byte is named).
    """
    content = read_bytes(path, limit, what, prefix)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = " (UTF-16?)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise UserError(f"{prefix}{path}: not UTF-8 text (byte {error.start}){hint}") from error


def _size(found: os.stat_result, path: str | Path, what: str, prefix: str) -> int:
    if stat.S_ISREG(found.st_mode):
        return found.st_size
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    kind = next((name for test, name in kinds.items() if test(found.st_mode)), "a device")
    raise UserError(f"{prefix}{path}: is {kind}, not a {what}")


def _complaint(path: str | Path, what: str, error: OSError | ValueError) -> str:
    shown = str(path) if len(str(path)) <= SHOWN else f"{str(path)[:SHOWN]}..."
    if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
        return f"{shown}: no such {what}"
    return f"{shown}: {error.strerror or error}"
