"""Where encoded samples come from: made anew each time, or once for all into memory-mapped arrays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from mmmamba.config_files import to_dict
from mmmamba.data.chat_template import JinjaTemplate
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import BadSample
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError, printable
from mmmamba.input_files import open_file
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json
from mmmamba.progress import Progress

#: Raised whenever what is stored, or how samples are encoded, changes: an older cache is then made anew.
_VERSION = 2

_META = "meta.json"
_TOLD = {"version", "fingerprint", "samples", "bytes", "sha256", "pictures", "bad"}
_CHUNK_ROWS = 256
_CHUNK_BYTES = 32 << 20  # of tiles, so that a few workers' chunks fit into memory at 448 pixels too


class EncodedSource:
    """A dataset that is encoded sample by sample, whenever one is asked for."""

    def __init__(
        self,
        dataset: JsonlDataset,
        processor: Processor,
        *,
        max_length: int | None = None,
        max_tiles: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.processor = processor
        self.max_length = max_length
        self.max_tiles = max_tiles

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def picture_hashes(self) -> PictureHashes:
        """By which the set's pictures are known."""
        return PictureHashes.of(self.dataset)

    def encode(self, index: int) -> Encoded:
        return self.processor.encode(self.dataset[index], max_length=self.max_length, max_tiles=self.max_tiles)


class EncodedCache:
    """The same samples, encoded once and read from disk ever after.

    A folder under ``directory`` holds one .npy array of each kind. Its name ends in a fingerprint of the JSONL's
    bytes, the tokenizer and every setting that decides an encoding, so a change of any of them makes a new one. Where
    pictures have changed in place, as :mod:`mmmamba.data.picture_hashes` sees it, everything is encoded again.

    It is written under another name and renamed when complete. Processes that want the same cache at the same time
    wait for the one that makes it.

    Args:
        on_bad_sample: ``stop`` raises the first bad sample's error, and leaves no cache; ``skip`` lists bad samples in
            :attr:`bad_samples`, and :meth:`encode` raises each one's error.
        workers: processes that encode; 0 encodes in this one.
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
        if not _complete(self.path, mark, self.picture_hashes):
            try:
                self._make(source, mark, workers, on_bad_sample)
            except OSError as error:
                hint = "a recipe with data.cache=false needs none"
                raise UserError(f"{self.path}: cannot write the cache: {error} ({hint})") from error
        meta = read_json(self.path / _META, limit=MAX_DATA_BYTES)
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
            # Another process may have made it meanwhile.
            if not _complete(self.path, mark, self.picture_hashes, say=False):
                _build(source, self.path, mark, workers, on_bad_sample)

    def _open(self) -> None:
        # A plain view of the map: slicing np.memmap itself costs microseconds a sample.
        arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
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


def fingerprint(source: EncodedSource) -> str:
    """sha256 of all that decides how ``source`` is encoded, the pictures' bytes excepted."""
    config = to_dict(source.processor.config)
    names = (
        "vision", "bos_token_id", "template", "system_message",
        "dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch",
    )  # fmt: skip
    settings = {
        "version": _VERSION,
        "image_root": str(source.dataset.image_root),
        "max_length": source.max_length,
        "max_tiles": source.max_tiles,
        "config": {name: config[name] for name in names},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(source.processor.tokenizer.identity.encode())
    if isinstance(source.processor.template, JinjaTemplate):  # the others are code, which _VERSION covers
        digest.update(source.processor.template.definition.encode())
    with open_file(source.dataset.path, "data file") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- building

_ARRAYS = {
    "tokens": np.int32, "labels": np.int32, "tiles": np.uint8, "ids": np.uint8,
    "token_counts": np.int32, "tile_counts": np.int32, "id_counts": np.int32, "cut": np.int32,
}  # fmt: skip


@dataclass
class _Chunk:
    """The samples of consecutive rows, joined; a bad row has no tokens, no tiles and no id."""

    arrays: dict[str, np.ndarray]
    bad: list[tuple[int, str]]
    error: UserError | None = None


class _Chunks:
    """Chunk number -> its rows, encoded."""

    def __init__(self, source: EncodedSource, rows: int, on_bad_sample: str) -> None:
        self.source = source
        self.rows = rows
        self.skip = on_bad_sample == "skip"

    def __len__(self) -> int:
        return -(-len(self.source) // self.rows)

    def __getitem__(self, chunk: int) -> _Chunk:
        samples: list[Encoded | None] = []
        bad: list[tuple[int, str]] = []
        for row in range(chunk * self.rows, min((chunk + 1) * self.rows, len(self.source))):
            try:
                samples.append(self.source.encode(row))
            except BadSample as error:
                if not self.skip:
                    return _Chunk({}, [], error)
                samples.append(None)
                bad.append((row, str(error)))
            except UserError as error:
                return _Chunk({}, [], error)
        return _Chunk(_joined(samples, self.source.processor), bad)


def _joined(samples: Sequence[Encoded | None], processor: Processor) -> dict[str, np.ndarray]:
    good = [sample for sample in samples if sample is not None]
    names = [b"" if sample is None else sample.id.encode("utf-8") for sample in samples]
    no_tokens, no_tiles = [np.empty(0, np.int32)], [np.empty((0, *_tile_shape(processor)), np.uint8)]
    counts = {
        "token_counts": [0 if sample is None else len(sample.input_ids) for sample in samples],
        "tile_counts": [0 if sample is None else len(sample.tiles) for sample in samples],
        "id_counts": [len(name) for name in names],
        "cut": [0 if sample is None else sample.cut for sample in samples],
    }
    return {
        "tokens": np.concatenate([sample.input_ids for sample in good] or no_tokens),
        "labels": np.concatenate([sample.labels for sample in good] or no_tokens),
        "tiles": np.concatenate([sample.tiles for sample in good] or no_tiles),
        "ids": np.frombuffer(b"".join(names), np.uint8),
        **{name: np.array(values, np.int32) for name, values in counts.items()},
    }


def _tile_shape(processor: Processor) -> tuple[int, int, int]:
    side = processor.config.vision.image_size if processor.config.vision else 0
    return side, side, 3


def _build(source: EncodedSource, final: Path, mark: str, workers: int, on_bad_sample: str) -> None:
    partial = final.with_name(f"{final.name}.partial")
    for leftover in (partial, final):  # of a killed process; the lock says that none is alive
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        bad = _write_arrays(source, partial, workers, on_bad_sample)
        sizes = {name: (partial / f"{name}.npy").stat().st_size for name in _ARRAYS}
        sums = {name: _sha256(partial / f"{name}.npy") for name in _ARRAYS if name != "tiles"}
        meta = {
            "version": _VERSION, "fingerprint": mark, "samples": len(source), "bytes": sizes, "sha256": sums,
            "pictures": source.picture_hashes.text, "bad": bad,
        }  # fmt: skip
        with open(partial / _META, "w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.rename(partial, final)


def _write_arrays(source: EncodedSource, folder: Path, workers: int, on_bad_sample: str) -> list[tuple[int, str]]:
    shape = _tile_shape(source.processor)
    tiles = source.max_tiles or source.processor.config.max_dynamic_patch
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(1, (tiles + 1) * shape[0] * shape[1] * shape[2])))
    parts = _Chunks(source, rows, on_bad_sample)
    # Workers are forked here, before the progress bar starts its thread.
    chunks = ordered(parts.__getitem__, 0, len(parts), workers=workers)
    bad: list[tuple[int, str]] = []
    writers = {
        name: _Growing(folder / f"{name}.npy", dtype, shape if name == "tiles" else ())
        for name, dtype in _ARRAYS.items()
    }
    shown = Progress(f"encoding {source.dataset.path}", total=len(source))
    with closing(chunks), shown as progress, _all_closed(writers):
        for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            for name, values in chunk.arrays.items():
                writers[name].append(values)
            bad += chunk.bad
            progress.advance(len(chunk.arrays["cut"]), bad=len(bad))
    return bad


class _Growing:
    """A .npy file that is appended to; its header is written again at the end, when the length is known."""

    def __init__(self, path: Path, dtype: type, row: tuple[int, ...] = ()) -> None:
        self.rows = 0
        self._row = row
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        np.ascontiguousarray(values, self._dtype).tofile(self._file)
        self.rows += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # of the same size: numpy leaves room for the first dimension to grow
        assert self._file.tell() == self._data_start
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        shape = (self.rows, *self._row)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class _all_closed:
    """Closes every writer, whatever happened."""

    def __init__(self, writers: dict[str, _Growing]) -> None:
        self.writers = writers

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers.values():
            writer.close()


def _complete(path: Path, mark: str, picture_hashes: PictureHashes, *, say: bool = True) -> bool:
    """Whether a cache is there as it was written: its name is given last, but files can be cut or altered later.

    What was altered is said, and made again from the data; so is a cache of pictures that have changed since.
    """
    if not path.exists():
        return False
    try:
        _check(path, mark)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # whatever a byte leads to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if say:
            print(f"{path}: the cache was altered or damaged and is made again ({reason})", file=sys.stderr)
        return False
    # A cache of an earlier version does not say which pictures it is of.
    changed = picture_hashes.changed(str(read_json(path / _META, limit=MAX_DATA_BYTES).get("pictures", "")))
    if changed is not None and say:
        print(f"{printable(changed)}: changed since it was encoded: the cache is made again", file=sys.stderr)
    return changed is None


def _check(path: Path, mark: str) -> None:
    """Refuse a cache whose files are not what ``meta.json`` and one another say.

    The small arrays are hashed; of the tiles, which may be hundreds of gigabytes, only the size is looked at.
    """
    meta = read_json(path / _META, limit=MAX_DATA_BYTES)
    if set(meta) - _TOLD or (meta["version"], meta["fingerprint"]) != (_VERSION, mark):
        raise UserError(f"{_META} says other things")
    samples, sums = meta["samples"], meta.get("sha256", {})  # an older cache has no checksums
    arrays = {}
    for name, dtype in _ARRAYS.items():
        file = path / f"{name}.npy"
        if file.stat().st_size != meta["bytes"][name]:
            raise UserError(f"{file.name} has another size")
        if name in sums and _sha256(file) != sums[name]:
            raise UserError(f"{file.name} has another checksum")
        arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        if arrays[name].dtype != dtype:
            raise UserError(f"{file.name} holds {arrays[name].dtype}")
    for name, counted in (("tokens", "token_counts"), ("tiles", "tile_counts"), ("ids", "id_counts")):
        counts = arrays[counted]
        if len(counts) != samples or counts.min(initial=0) < 0 or int(counts.sum(dtype=np.int64)) != len(arrays[name]):
            raise UserError(f"{counted}.npy does not fit {name}.npy")
    if len(arrays["labels"]) != len(arrays["tokens"]) or len(arrays["cut"]) != samples:
        raise UserError("the arrays are not of one length")
    for row, message in meta["bad"]:
        if type(row) is not int or not 0 <= row < samples or not isinstance(message, str):
            raise UserError(f"{_META}: 'bad' lists {row!r}")


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The system frees the lock of a process that dies."""
    import fcntl  # not on Windows, where only a cache needs it

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
