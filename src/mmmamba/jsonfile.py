"""Reads JSON strictly and within bounds. This package parses JSON only here.

Python's own reader keeps the last of two equal keys, takes ``NaN`` and ``Infinity``, and ends in a RecursionError for a
text of brackets. Here each of those, a number that no float holds, half a surrogate pair, and a file too large to be
what it is read as are complaints of one line. What is not said twice is not guessed: a text either means one thing to
every reader of JSON, or it is refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from mmmamba import input_files
from mmmamba.errors import UserError

MAX_BYTES = 16 << 20  # of a file that describes something; in memory it may take twenty times as much
MAX_TOKENIZER_BYTES = 128 << 20  # of tokenizer.json: one of 260,000 pieces takes 35 MB
MAX_DATA_BYTES = 1 << 30  # of a file that holds data, or that one of our runs wrote
MAX_DEPTH = 64  # lists and objects inside one another
MAX_DIGITS = 64  # of a whole number; 2**63 has 19
_SHOWN = 60  # characters of a value in a message


class JsonError(ValueError):
    """What is wrong with a text, and in which line, if that is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def read_json(path: str | Path, where: str | Path | None = None, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        where: named in messages (default: the path).
        limit: most bytes that are read.

    Raises:
        UserError: it is anything but a regular file of at most ``limit`` bytes that holds one object.
    """
    path, where = Path(path), where or path
    data = read_any(path, where, limit=limit)
    if not isinstance(data, dict):
        raise UserError(f"{where}: must hold a JSON object, got {type(data).__name__}")
    return data


def read_any(path: str | Path, where: str | Path | None = None, *, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file, of any kind. Arguments and errors are those of :func:`read_json`."""
    path, where = Path(path), where or path
    try:
        return parse(read_bytes(path, where, limit=limit))
    except JsonError as error:
        raise UserError(f"{where}:{error.line}: {error}" if error.line else f"{where}: {error}") from error


def parse_json(text: str | bytes, where: str | Path, *, error: type[UserError] = UserError) -> Any:
    """The value of a JSON text.

    Args:
        text: a text, or its UTF-8 bytes.
        where: named in messages, such as ``file.jsonl:12``.
        error: the exception to raise.

    Raises:
        UserError: (or ``error``) saying what is wrong.
    """
    try:
        return parse(text)
    except JsonError as problem:
        raise error(f"{where}: {problem}") from problem


def read_lines(path: str | Path, *, limit: int = MAX_DATA_BYTES) -> list[dict[str, Any]]:
    """The objects of a log that one of our runs writes, one on each line. An incomplete last line is left out.

    Raises:
        UserError: naming the file and the line.
    """
    *whole, _ = read_bytes(path, limit=limit).split(b"\n")
    found = [parse_json(line, f"{path}:{number}") for number, line in enumerate(whole, start=1)]
    for number, entry in enumerate(found, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: must hold a JSON object, got {shown(entry)}")
    return found


def read_text(path: str | Path, where: str | Path | None = None, *, limit: int = MAX_BYTES) -> str:
    """The UTF-8 text of a regular file: :func:`mmmamba.input_files.read_text`."""
    return input_files.read_text(path, limit, where=where)


def read_bytes(path: str | Path, where: str | Path | None = None, *, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file: :func:`mmmamba.input_files.read_bytes`."""
    return input_files.read_bytes(path, limit, where=where)


# ---------------------------------------------------------------------------------------------- the text


def parse(text: str | bytes) -> Any:
    """The value of a JSON text (or of its UTF-8 bytes, with or without a byte order mark).

    Raises:
        JsonError: saying what is wrong, without the file's name.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(f"not UTF-8 text (byte {error.start})") from error
    try:
        data = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} (character {error.colno} of the line)", error.lineno) from error
    except RecursionError as error:
        raise JsonError(_too_deep()) from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(data)
    if _HALF.search(text):
        _check_surrogates(data)
    return data


def shown(value: Any) -> str:
    """A value as Python prints it, shortened, on one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {shown(key)} appears twice in one object")
            seen.add(key)
    return data


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonError(f"not usable JSON: a number of {len(text)} digits ({text[:20]}...)")
    return int(text)


def _decimal(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"not usable JSON: the number {shown(text)[1:-1]} is too large")
    return value


def _constant(name: str) -> float:
    raise JsonError(f"not JSON: {name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_whole, parse_float=_decimal, parse_constant=_constant)
_HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _too_deep() -> str:
    return f"not usable JSON: lists and objects nested too deeply (more than {MAX_DEPTH} levels)"


def _check_depth(data: Any) -> None:
    level: list[Any] = [[data]]
    for _ in range(MAX_DEPTH + 1):
        items = (item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder))
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise JsonError(_too_deep())


def _check_surrogates(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise JsonError(f"not usable JSON: half a character ({half}), which no text holds") from error
