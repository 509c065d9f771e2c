"""Hashes of a set's pictures, which tell whether the pictures are still the same.

The hash of the JSONL says nothing about the pictures that it names. Hashing a million pictures at the start of each run
would take too long. So in a set of more than :data:`ALL` records only the pictures of :data:`SAMPLED` records are
hashed, spread evenly. This finds a set whose pictures were replaced. It may miss a single picture that changed in a
large set.
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
_LOST = "-"  # a missing picture: nothing says whether it changed


@dataclass(frozen=True)
class PictureHashes:
    """The pictures of a set that are hashed, in order, each with its hash."""

    pictures: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, dataset: JsonlDataset) -> PictureHashes:
        """Hash the pictures.

        Bad records and missing pictures are left to the code that reads the samples: it reports them.
        """
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
        """The hashes as one text, to be stored."""
        return " ".join(mark for _, mark in self.pictures)

    def changed(self, kept: str) -> str | None:
        """The first picture whose hash differs from the stored one. None if there is none, or if nobody can tell."""
        before = kept.split()
        if len(before) != len(self.pictures):
            # A version that hashed other pictures stored it; the records' own hash says that they are the same.
            return None
        for (path, mark), old in zip(self.pictures, before, strict=True):
            if mark != old and _LOST not in (mark, old):
                return path
        return None
