"""The GGUF file format: the header of a file, and the bytes of each tensor.

Read strictly and within bounds: a header is somebody else's claim, and a count of 2^60 in it is refused before
anything is made for it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mmmamba.errors import UserError
from mmmamba.jsonfile import shown

MAX_FIELDS = 10_000  # a model has fewer than a hundred
MAX_TENSORS = 100_000
MAX_ITEMS = 4_000_000  # of all lists together; a vocabulary of 260,000 pieces takes 1,500,000
MAX_STRING = 1 << 24  # bytes of a text, such as a chat template

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Items:
    """A list in a header. Only its length is kept."""

    count: int

    def __repr__(self) -> str:
        return f"a list of {self.count}"


@dataclass(frozen=True)
class Entry:
    """One tensor: its shape in PyTorch's order, its kind of numbers, and where its bytes are in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """The header: everything before the tensors' bytes.

    Attributes:
        fields: name → number, text, flag, or :class:`Items`.
        tensors: name → :class:`Entry`. Each is inside the file.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Entry] = field(default_factory=dict)


def read_header(path: Path, blocks: dict[int, tuple[int, int]]) -> GgufHeader:
    """The header of a GGUF file.

    Args:
        path: the file.
        blocks: kind of numbers → (numbers in a block, its bytes).

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, blocks).header()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (struct.error, ValueError, OverflowError) as error:  # an empty file can't be mapped
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: truncated or not a GGUF file") from error


class _Reader:
    """A position in the file that moves forward."""

    def __init__(self, path: Path, data: mmap.mmap, blocks: dict[int, tuple[int, int]]) -> None:
        self.path, self.data, self.blocks = path, data, blocks
        self.at, self.items = 0, 0

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: not a usable GGUF file: {message}")

    def header(self) -> GgufHeader:
        if self.take(4) != _MAGIC:
            raise self.error("it does not start with 'GGUF'")
        version = self.number("<I")
        if version not in _VERSIONS:
            raise self.error(f"its version is {version}: only {' and '.join(map(str, _VERSIONS))} are read")
        tensors = self.count("tensors", MAX_TENSORS)
        fields: dict[str, Any] = {}
        for _ in range(self.count("fields", MAX_FIELDS)):
            name = self.text("a field's name")
            if name in fields:
                raise self.error(f"the field {shown(name)} appears twice")
            fields[name] = self.value(name, self.number("<I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise self.error(f"'general.alignment' is {shown(alignment)}")
        start = -(-self.at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, entry in found:
            if name in entries:
                raise self.error(f"the tensor {shown(name)} appears twice")
            begin = start + entry.begin
            if begin + entry.size > len(self.data):
                raise self.error(f"truncated: the tensor {shown(name)} ends after the file does")
            entries[name] = Entry(entry.shape, entry.kind, begin, entry.size)
        return GgufHeader(fields, entries)

    def tensor(self) -> tuple[str, Entry]:
        name = self.text("a tensor's name")
        ranks = self.number("<I")
        if ranks > 4:
            raise self.error(f"the tensor {shown(name)} has {ranks} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(ranks)]))  # the file lists the fastest dimension first
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in self.blocks:
            raise self.error(f"the tensor {shown(name)} is of kind {kind}, which is not known")
        numbers, size = self.blocks[kind]
        row = shape[-1] if shape else 1
        if row % numbers:
            raise self.error(f"the tensor {shown(name)} has rows of {row}, which are no blocks of {numbers}")
        return name, Entry(shape, kind, offset, prod(shape) // numbers * size)

    def value(self, name: str, kind: int) -> Any:
        if kind == _STRING:
            return self.text(f"the field {shown(name)}")
        if kind != _ARRAY:
            return self.number(self.scalar(name, kind))
        inner, count = self.number("<I"), self.number("<Q")
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.error(f"the field {shown(name)} is a list of {count}, more than any model has")
        if inner == _STRING:
            for _ in range(count):
                self.take(self.number("<Q"))
        else:
            self.take(count * struct.calcsize(self.scalar(name, inner)))
        return Items(count)

    def scalar(self, name: str, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.error(f"the field {shown(name)} is of kind {kind}, which is not read")
        return _SCALARS[kind]

    def count(self, what: str, most: int) -> int:
        found: int = self.number("<Q")
        if found > most:
            raise self.error(f"it says that it has {found:,} {what}, more than any model has")
        return found

    def text(self, what: str) -> str:
        length = self.number("<Q")
        if length > MAX_STRING:
            raise self.error(f"{what} claims to be {length:,} bytes long")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 text") from error

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise self.error("truncated: its header ends after the file does")
        found = self.data[self.at : self.at + size]
        self.at += size
        return found
