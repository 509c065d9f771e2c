"""The standard streams of a command, made safe to use whatever the shell did to them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Sequence

from mmmamba.errors import UserError

NARROWEST = 40  # columns: rich and tyro hang if a column has no room for a letter


def prepare(args: Sequence[str]) -> None:
    """Make the streams of this process safe to write to, and refuse what can't be.

    A character that a stream's encoding lacks is written as ``?`` (on stderr as an escape): a job of hours must not
    fail at its last line. Input that isn't UTF-8 is kept as it is, for the one who reads it to refuse.

    Raises:
        UserError: stdout is closed, or the bytes of an argument are not text.
    """
    closed = _open_what_is_closed()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    if 1 in closed:
        raise UserError("standard output is closed; send it to /dev/null if nobody wants it")
    for i, argument in enumerate(args, 1):
        if not is_text(argument):
            raise UserError(f"argument {i} is not {sys.getfilesystemencoding().upper()} text: '{argument}'")


def is_text(text: str) -> bool:
    """Whether ``text`` is valid UTF-8. It is not if it was read from other bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def why_not_written(error: OSError) -> str:
    """An error of the system in one line, with the file, or stdout. If it was stdout, nothing more is written to it."""
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    try:
        sys.stdout.flush()  # fails again if stdout is the cause: what was not written is still in its buffer
    except OSError as again:
        discard_stdout()
        return f"standard output: {again.strerror}"
    return f"writing failed: {error.strerror or error}"


def complain(message: str) -> None:
    """Print a line on stderr, if possible. (The exit code tells of the error too.)"""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)


def discard_stdout() -> None:
    """Send stdout to nowhere. Python flushes it again at exit, and that must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_what_is_closed() -> set[int]:
    """Replace each closed standard stream by /dev/null, so that no file of ours gets its number."""
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            closed.add(number)
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    return closed
