"""Encoded samples, stored once in memory-mapped arrays and read from disk after that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmmamba.data.encoded_cache_format import ARRAYS, META, is_complete
from mmmamba.data.encoded_cache_writing import write_cache
from mmmamba.data.encoded_source import EncodedSource, fingerprint
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import BadSample
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json


class EncodedCache:
    """The samples of a dataset, encoded once and then read from disk.

    A folder in ``directory`` holds one .npy array of each kind. Its name ends in a fingerprint of the JSONL's bytes,
    the tokenizer and every setting that decides an encoding. If any of these changes, a new cache is made. If pictures
    changed in place (see :mod:`mmmamba.data.picture_hashes`), everything is encoded again.

    The folder is written under another name and renamed when it is complete. If several processes want the same cache
    at the same time, one makes it and the others wait.

    Args:
        on_bad_sample: ``stop`` raises the first bad sample's error, and leaves no cache; ``skip`` lists bad samples in
            :attr:`bad_samples`, and :meth:`encode` raises each one's error.
        workers: processes that encode; 0 encodes in this process.
    """

    def __init__(
        self,
        dataset: JsonlDataset,
        processor: Processor,
        directory: str | Path,
        *,
        workers: int = 0,
        max_length: int | None = None,
        max_tiles: int | None = None,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        source = EncodedSource(dataset, processor, max_length=max_length, max_tiles=max_tiles)
        mark = fingerprint(source)
        self.dataset = dataset
        self.path = Path(directory) / f"{dataset.path.stem}-{mark[:16]}"
        self.picture_hashes = source.picture_hashes
        if not is_complete(self.path, mark, self.picture_hashes):
            try:
                self._make(source, mark, workers, on_bad_sample)
            except OSError as error:
                hint = "a recipe with data.cache=false needs none"
                raise UserError(f"{self.path}: cannot write the cache: {error} ({hint})") from error
        meta = read_json(self.path / META, limit=MAX_DATA_BYTES)
        self._bad: dict[int, str] = {int(row): message for row, message in meta["bad"]}
        if self._bad and on_bad_sample == "stop":
            raise BadSample(next(iter(self._bad.values())))
        self._open()

    def __len__(self) -> int:
        return len(self._cut)

    @property
    def bad_samples(self) -> list[str]:
        """The error message of every bad sample, in the dataset's order."""
        return list(self._bad.values())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (n,); 0 for a bad one."""
        return np.diff(self._token_ends)

    def encode(self, index: int) -> Encoded:
        """Sample ``index``, as views of the mapped arrays."""
        if index in self._bad:
            raise BadSample(self._bad[index])
        start, stop = self._token_ends[index : index + 2].tolist()
        first_tile, end_tile = self._tile_ends[index : index + 2].tolist()
        first_byte, end_byte = self._id_ends[index : index + 2].tolist()
        return Encoded(
            input_ids=self._tokens[start:stop],
            labels=self._labels[start:stop],
            tiles=self._tiles[first_tile:end_tile],
            id=self._ids[first_byte:end_byte].tobytes().decode("utf-8"),
            where=self.dataset.where(index),
            cut=int(self._cut[index]),
        )

    def _make(self, source: EncodedSource, mark: str, workers: int, on_bad_sample: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_name(f"{self.path.name}.lock")):
            # Another process may have made it in the meantime.
            if not is_complete(self.path, mark, self.picture_hashes, say=False):
                write_cache(source, self.path, mark, workers, on_bad_sample)

    def _open(self) -> None:
        # A plain view of the map: slicing np.memmap itself costs microseconds a sample.
        arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ARRAYS}
        self._tokens, self._labels, self._tiles, self._ids = (arrays[n] for n in ("tokens", "labels", "tiles", "ids"))
        self._token_ends, self._tile_ends, self._id_ends = (
            np.concatenate([[0], np.cumsum(arrays[name], dtype=np.int64)])
            for name in ("token_counts", "tile_counts", "id_counts")
        )
        self._cut = np.array(arrays["cut"])

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("dataset", "path", "_bad")}  # the maps are opened again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let in one process at a time. The system frees the lock of a process that dies."""
    import fcntl  # not on Windows, where only a cache needs it

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
