"""Whether a set's pictures are still the ones that they were: hashes of their bytes, of all or of an even sample.

The JSONL's own hash says nothing of the pictures that it names. Hashing a million of them whenever a run begins would
take longer than it is worth, so of a large set only the pictures of :data:`SAMPLED` records are read, spread evenly:
a set whose pictures were replaced is found, one picture that changed in a large set may not be. Of a set of up to
:data:`ALL` records every picture is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.sample import BadSample
from mmmamba.outputs import file_hash

ALL = 4096  # records
SAMPLED = 1024  # of a larger set
_LOST = "-"  # a picture that is not there, which can't be told from what it was


@dataclass(frozen=True)
class PictureHashes:
    """The pictures of a set that are looked at, in order, and a hash of each."""

    pictures: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, dataset: JsonlDataset) -> PictureHashes:
        """Read the pictures; a record that is not right, and a picture that is not there, is told by what reads it."""
        count = len(dataset)
        rows: Iterable[int] = range(count) if count <= ALL else (i * count // SAMPLED for i in range(SAMPLED))
        paths: dict[str, None] = {}
        for row in rows:
            try:
                paths |= dict.fromkeys(dataset[row].images)
            except BadSample:
                continue
        return cls(tuple((path, file_hash(Path(path))[:16] or _LOST) for path in paths))

    @cached_property
    def text(self) -> str:
        """The hashes, to be kept."""
        return " ".join(mark for _, mark in self.pictures)

    def changed(self, kept: str) -> str | None:
        """The first picture whose hash is not the one that was kept; None where there is none, or no telling."""
        before = kept.split()
        if len(before) != len(self.pictures):
            return None  # kept by a version that looked at others: the records are the same, by their own hash
        for (path, mark), old in zip(self.pictures, before, strict=True):
            if mark != old and _LOST not in (mark, old):
                return path
        return None
