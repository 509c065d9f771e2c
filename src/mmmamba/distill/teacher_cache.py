"""The teacher's most likely tokens, kept on disk: a sample that any run has met costs no second pass of the teacher.

A folder holds what one teacher says at one temperature, in one number format, of k tokens. Samples are found in it by
their content (tokens, pictures, and what of them is scored), so all students of a teacher share it, whatever their
recipes, and a sample that changed is another sample. Each process appends to a file of its own. A record has a
checksum: what a killed process left half-written, or a disk spoilt, is worked out again.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from mmmamba.checkpoints.io import write_atomically, write_json
from mmmamba.data.loader import Skipped
from mmmamba.data.packed_batch import Batch
from mmmamba.distill import processes
from mmmamba.distill.objectives import autocast, inputs
from mmmamba.distill.run_folder import digest
from mmmamba.distill.train_config import StageConfig
from mmmamba.distill.trainer import Rows
from mmmamba.distill.training_step import move
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.model.model import Model
from mmmamba.ops.kl.top_k import top_k

FORMAT = 1  # of the files
HEAD = struct.Struct("<16sII")  # of a record: the sample's digest, how many tokens, the checksum of what follows
META = "teacher.json"


@dataclass(frozen=True)
class _Place:
    """Where a record's values lie."""

    file: Path
    start: int
    tokens: int
    checksum: int


class TeacherCache:
    """What a teacher says of samples: read where it is known, else asked of the teacher and written.

    Args:
        teacher: asked where a sample is new.
        teacher_hash: of its files.
        stage: what it is kept for: k, temperature, and whether prompts count.
        precision: of the teacher's passes.
        directory: where the folder is made.

    Raises:
        UserError: when the folder can't be written, or isn't what its name says.
    """

    def __init__(
        self, teacher: Model, teacher_hash: str, stage: StageConfig, precision: torch.dtype, directory: Path
    ) -> None:
        self.teacher, self.stage, self.precision = teacher, stage, precision
        vocabulary = teacher.config.vocab_size
        if stage.cache_teacher >= vocabulary:
            raise UserError(f"cache_teacher is {stage.cache_teacher}, the teacher has {vocabulary:,} tokens in all")
        meta = {
            "format": FORMAT,
            "teacher": teacher_hash,
            "tokens": "all" if stage.prompt_weight else "scored",
            "k": stage.cache_teacher,
            "temperature": stage.temperature,
            "precision": str(precision).removeprefix("torch."),
            "vocabulary": vocabulary,
        }
        self._ids = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self.bytes_a_token = stage.cache_teacher * self._ids.itemsize + 2 * (stage.cache_teacher + 1)
        self.path = directory / f"teacher-{digest(meta)}"
        if not (self.path / META).exists():
            write_atomically(self.path / META, lambda path: write_json(path, meta))
        elif read_json(self.path / META) != meta:
            raise UserError(f"{self.path / META}: is not what the folder's name says; remove the folder")
        self._places = {key: place for file in sorted(self.path.glob("*.bin")) for key, place in self._scan(file)}
        self._own = self.path / f"{uuid.uuid4().hex}.bin"
        self._file: BinaryIO | None = None
        self.read = self.asked = 0  # tokens
        self._left_out = 0.0  # probability of the tokens that are not kept, summed over all that were attached

    def attach(self, row: Batch) -> Batch:
        """Return the row with the teacher's tokens: ``top_ids`` and ``top_log_probs``."""
        keys, counts = self._keys(row), self._counts(row)
        known = [self._known(key, count) for key, count in zip(keys, counts, strict=True)]
        if any(one is None for one in known):
            ids, log_probs = self._ask(row)
            starts = np.cumsum([0, *counts])
            for i, key in enumerate(keys):
                part = slice(starts[i], starts[i + 1])
                if known[i] is None:
                    self._write(key, ids[part], log_probs[part])
                    known[i] = ids[part], log_probs[part]
                    self.asked += counts[i]
                else:
                    self.read += counts[i]
        else:
            self.read += sum(counts)
        found = [one for one in known if one is not None]
        ids, log_probs = (np.concatenate([one[i] for one in found]) for i in range(2))
        self._left_out += float(np.exp(log_probs[:, -1].astype(np.float64)).sum())
        return replace(
            row,
            top_ids=torch.from_numpy(ids.astype(np.int32))[None],
            top_log_probs=torch.from_numpy(log_probs)[None],
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def report(self) -> str:
        """Say in a line what was read and what was asked."""
        size = sum(file.stat().st_size for file in self.path.glob("*.bin"))
        seen = self.read + self.asked
        return (
            f"teacher cache {self.path}: {self.read:,} tokens read, {self.asked:,} asked of the teacher, "
            f"{self.bytes_a_token} bytes a token, {size / 1e6:,.1f} MB; {self.stage.cache_teacher} tokens hold "
            f"{100 - 100 * self._left_out / max(seen, 1):.2f} % of the teacher's probability"
        )

    def _counts(self, row: Batch) -> list[int]:
        """How many tokens of each sequence of a row are kept."""
        if self.stage.prompt_weight:
            return row.cu_seqlens.diff().tolist()
        borders = np.searchsorted(row.scored.numpy(), row.cu_seqlens.numpy())
        return np.diff(borders).tolist()

    def _keys(self, row: Batch) -> list[bytes]:
        ids, labels, tiles = row.input_ids[0].numpy(), row.labels[0].numpy(), row.tiles.numpy()
        borders, pictures = row.cu_seqlens.tolist(), np.cumsum([0, *row.tile_counts])
        keys = []
        for i in range(row.sequences):
            part = slice(borders[i], borders[i + 1])
            found = hashlib.blake2b(ids[part].tobytes(), digest_size=16)
            found.update(np.ascontiguousarray(tiles[pictures[i] : pictures[i + 1]]).tobytes())
            if not self.stage.prompt_weight:
                found.update(labels[part].tobytes())
            keys.append(found.digest())
        return keys

    @torch.no_grad()
    def _ask(self, row: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's pass over a row: ids (t, k) and log-probabilities (t, k+1) of the tokens that are kept."""
        there = move(row, self.teacher.device)
        with autocast(self.teacher.device, self.precision):
            hidden = self.teacher(**inputs(self.teacher, there), cu_seqlens=there.cu_seqlens, logits="none").hidden[0]
            kept = hidden if self.stage.prompt_weight else hidden.index_select(0, there.scored)
            ids, log_probs = top_k(kept, self.teacher.head.weight, self.stage.cache_teacher, self.stage.temperature)
        return ids.cpu().numpy().astype(self._ids), log_probs.to(torch.float16).cpu().numpy()

    # ------------------------------------------------------------------------------------------ files

    def _scan(self, file: Path) -> Iterator[tuple[bytes, _Place]]:
        """The records of a file, up to the first that is not whole."""
        size = file.stat().st_size
        with open(file, "rb") as source:
            at = 0
            while at + HEAD.size <= size:
                source.seek(at)
                key, tokens, checksum = HEAD.unpack(source.read(HEAD.size))
                place = _Place(file, at + HEAD.size, tokens, checksum)
                at = place.start + tokens * self.bytes_a_token
                if at > size:
                    return
                yield key, place

    def _known(self, key: bytes, tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
        place = self._places.get(key)
        if place is None or place.tokens != tokens:
            return None
        try:
            with open(place.file, "rb") as source:
                source.seek(place.start)
                data = source.read(tokens * self.bytes_a_token)
        except OSError:
            return None
        k = self.stage.cache_teacher
        if len(data) != tokens * self.bytes_a_token or zlib.crc32(data) != place.checksum:
            return None
        ids = np.frombuffer(data, self._ids, tokens * k).reshape(tokens, k)
        return ids, np.frombuffer(data, "<f2", offset=ids.nbytes).reshape(tokens, k + 1)

    def _write(self, key: bytes, ids: np.ndarray, log_probs: np.ndarray) -> None:
        data = np.ascontiguousarray(ids).tobytes() + np.ascontiguousarray(log_probs, "<f2").tobytes()
        checksum = zlib.crc32(data)
        try:
            if self._file is None:
                self._file = open(self._own, "wb")
            start = self._file.tell() + HEAD.size
            self._file.write(HEAD.pack(key, len(ids), checksum) + data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._own}: not written: {error.strerror or error}; make room and resume the run, or set "
                "cache_teacher to 0 in another"
            ) from error
        self._places[key] = _Place(self._own, start, len(ids), checksum)


class RowsWithTeacher:
    """The rows of a stage, each with the teacher's tokens."""

    def __init__(self, rows: Rows, cache: TeacherCache) -> None:
        self._rows, self._cache = rows, cache
        self.bad_samples: list[Skipped] = []

    def __call__(self, start: int) -> Iterator[Sequence[Batch]]:
        for rows in self._rows(start):
            self.bad_samples = self._rows.bad_samples
            yield [self._cache.attach(row) for row in rows]


@contextmanager
def teacher_rows(
    rows: Rows, teacher: Model, teacher_hash: str, stage: StageConfig, precision: torch.dtype, directory: Path
) -> Iterator[Rows]:
    """Give the rows of a stage, with the teacher's tokens where it keeps them; report on the cache at the end."""
    if not stage.cache_teacher:
        yield rows
        return
    cache = TeacherCache(teacher, teacher_hash, stage, precision, directory)
    try:
        yield RowsWithTeacher(rows, cache)
    finally:
        cache.close()
    if processes.is_main():
        print(cache.report())
