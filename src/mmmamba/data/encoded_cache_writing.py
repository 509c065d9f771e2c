"""Writes an encoded cache: every sample of a source, encoded by worker processes, appended to .npy files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmmamba.data.encoded_cache_format import ARRAYS, META, file_sha256
from mmmamba.data.encoded_source import ENCODING_VERSION, EncodedSource
from mmmamba.data.processor import Encoded, Processor
from mmmamba.data.sample import BadSample
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError
from mmmamba.progress import Progress

_CHUNK_ROWS = 256
_CHUNK_BYTES = 32 << 20  # of tiles, so that a few workers' chunks fit into memory at 448 pixels too


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


def write_cache(source: EncodedSource, final: Path, mark: str, workers: int, on_bad_sample: str) -> None:
    partial = final.with_name(f"{final.name}.partial")
    for leftover in (partial, final):  # of a killed process; the lock says that none is alive
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    try:
        bad = _write_arrays(source, partial, workers, on_bad_sample)
        sizes = {name: (partial / f"{name}.npy").stat().st_size for name in ARRAYS}
        sums = {name: file_sha256(partial / f"{name}.npy") for name in ARRAYS if name != "tiles"}
        meta = {
            "version": ENCODING_VERSION, "fingerprint": mark, "samples": len(source), "bytes": sizes, "sha256": sums,
            "pictures": source.picture_hashes.text, "bad": bad,
        }  # fmt: skip
        with open(partial / META, "w", encoding="utf-8") as file:
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
        for name, dtype in ARRAYS.items()
    }
    shown = Progress(f"encoding {source.dataset.path}", total=len(source))
    with closing(chunks), shown as progress, ExitStack() as files:
        for writer in writers.values():
            files.enter_context(closing(writer))
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
