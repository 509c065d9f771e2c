"""InternVL-style JSONL, indexed by byte offset and read one line at a time."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from mmmamba.data.sample import GPT, HUMAN, ROLES, SYSTEM, BadSample, Sample, Turn
from mmmamba.errors import UserError
from mmmamba.input_files import check_file, open_file, read_part, stamp_of
from mmmamba.jsonfile import parse_json

#: Bytes of a line: about two million tokens of English.
MAX_LINE = 8 << 20

_WHAT = "data file"
_KNOWN_KEYS = ("id", "image", "video", "conversations")


class JsonlDataset:
    """A sequence of :class:`Sample`. The file is scanned once for line starts and never held in memory.

    No file handle is kept, so one instance can be pickled, forked and used by many workers at once. Blank lines are
    passed over; every other line must be a record.

    Args:
        path: the JSONL file (UTF-8).
        image_root: folder that relative image paths start from; the file's own folder when omitted.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = Path(path)
        check_file(self.path, _WHAT)
        self.image_root = Path(image_root if image_root is not None else self.path.parent).absolute()
        if image_root is not None and not self.image_root.is_dir():
            raise UserError(f"{image_root}: no such image folder")
        #: (n,) byte offset, byte length and 1-based line number of each record.
        self._starts, self._lengths, self._lines, self._stamp = _index(self.path)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """``file.jsonl:LINE`` of record ``index``."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        start, length = int(self._starts[index]), int(self._lengths[index])
        if length > MAX_LINE:
            raise BadSample(f"{self.where(index)}: the line has {length:,} bytes, may have {MAX_LINE:,}")
        line = read_part(self.path, start, length, self._stamp, _WHAT)
        return parse(line, where=self.where(index), image_root=self.image_root)


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """Start, length and number of each line that is not blank, and the file's stamp at that time."""
    starts, lengths, lines = array("q"), array("q"), array("q")
    offset = number = 0
    with open_file(path, _WHAT) as file:
        stamp = stamp_of(os.fstat(file.fileno()))
        try:
            # A file of size 0 is not read: some of the system's own files say 0 and never end.
            while stamp[2] and (line := file.readline(MAX_LINE + 1)):
                length, blank = len(line), line.isspace()
                # Skip the rest of a line that is too long, in pieces.
                while len(line) > MAX_LINE and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE + 1)
                    length, blank = length + len(line), blank and (not line or line.isspace())
                number += 1
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{path}: is UTF-16 text, must be UTF-8")
                if not blank:
                    starts.append(offset)
                    lengths.append(length)
                    lines.append(number)
                offset += length
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
    begins, sizes, numbers = (np.array(column, dtype=np.int64) for column in (starts, lengths, lines))
    return begins, sizes, numbers, stamp


def parse(line: bytes, *, where: str, image_root: Path) -> Sample:
    """One JSON line as a :class:`Sample`. Anything wrong with it raises a :class:`BadSample` that names the field."""
    record = _load_object(line, where)
    if record.get("video") is not None:
        raise BadSample(f"{where}: 'video': video samples need a later version of mmmamba")
    return Sample(
        id=_identity(record, where),
        turns=_turns(record, where),
        images=_images(record, where, image_root),
        where=where,
        extra={key: value for key, value in record.items() if key not in _KNOWN_KEYS},
        named=record.get("id") is not None,
    )


def _load_object(line: bytes, where: str) -> dict[str, Any]:
    record = parse_json(line, where, error=BadSample)
    if not isinstance(record, dict):
        raise BadSample(f"{where}: the line must be a JSON object, got {_kind(record)}")
    return record


def _identity(record: dict[str, Any], where: str) -> str:
    value = record.get("id")
    if value is None:
        return where.rpartition(":")[2]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSample(f"{where}: 'id' must be a string or a number, got {_kind(value)}")
    return encodable(str(value), where, "id")


def _images(record: dict[str, Any], where: str, image_root: Path) -> tuple[str, ...]:
    value = record.get("image")
    if value is None:
        return ()
    if isinstance(value, str):
        return (_image_path(value, where, "image", image_root),)
    if not isinstance(value, list):
        raise BadSample(f"{where}: 'image' must be a path or a list of paths, got {_kind(value)}")
    return tuple(_image_path(item, where, f"image[{i}]", image_root) for i, item in enumerate(value))


def _image_path(value: Any, where: str, name: str, image_root: Path) -> str:
    if not isinstance(value, str):
        raise BadSample(f"{where}: '{name}' must be a path, got {_kind(value)}")
    if not value or "\0" in value:
        raise BadSample(f"{where}: '{name}' must be a path, got {value!r}")
    return str(image_root / encodable(value, where, name))


def _turns(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if "conversations" not in record:
        raise BadSample(f"{where}: 'conversations' is missing")
    items = record["conversations"]
    if not isinstance(items, list):
        raise BadSample(f"{where}: 'conversations' must be a list of turns, got {_kind(items)}")
    turns = tuple(_turn(item, where, f"conversations[{i}]") for i, item in enumerate(items))
    first = 1 if turns and turns[0].role == SYSTEM else 0
    if len(turns) == first:
        raise BadSample(f"{where}: 'conversations' is empty" + (" after its system turn" if first else ""))
    for i, turn in enumerate(turns[first:]):
        expected = HUMAN if i % 2 == 0 else GPT
        if turn.role != expected:
            raise BadSample(
                f"{where}: 'conversations[{first + i}].from' must be '{expected}' here, got '{turn.role}' "
                "(an optional 'system' turn first, then 'human' and 'gpt' in alternation)"
            )
    return turns


def _turn(item: Any, where: str, name: str) -> Turn:
    if not isinstance(item, dict):
        raise BadSample(f"{where}: '{name}' must be an object with 'from' and 'value', got {_kind(item)}")
    for key in ("from", "value"):
        if key not in item:
            raise BadSample(f"{where}: '{name}.{key}' is missing")
    role, text = item["from"], item["value"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadSample(f"{where}: '{name}.from' must be one of {', '.join(ROLES)}, got {_short(role)}")
    if not isinstance(text, str):
        raise BadSample(f"{where}: '{name}.value' must be a string, got {_kind(text)}")
    return Turn(role, encodable(text, where, f"{name}.value"))


def encodable(text: str, where: str, name: str) -> str:
    """Refuse half of a surrogate pair: JSON may hold it, but no tokenizer and no file system can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(f"{where}: '{name}' holds a lone surrogate at character {error.start}") from error
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
