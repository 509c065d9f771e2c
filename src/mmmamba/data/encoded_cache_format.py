"""What the folder of an encoded cache holds, and whether it is complete and unchanged."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from mmmamba.data.encoded_source import ENCODING_VERSION
from mmmamba.data.picture_hashes import PictureHashes
from mmmamba.errors import UserError, printable
from mmmamba.jsonfile import MAX_DATA_BYTES, read_json

META = "meta.json"
TOLD = {"version", "fingerprint", "samples", "bytes", "sha256", "pictures", "bad"}  # keys of meta.json
ARRAYS = {
    "tokens": np.int32, "labels": np.int32, "tiles": np.uint8, "ids": np.uint8,
    "token_counts": np.int32, "tile_counts": np.int32, "id_counts": np.int32, "cut": np.int32,
}  # fmt: skip


def is_complete(path: Path, mark: str, picture_hashes: PictureHashes, *, say: bool = True) -> bool:
    """Whether a cache exists and its files are unchanged since they were written.

    If they were altered, or if pictures have changed since, a message says so and the answer is False. The caller then
    makes the cache again.
    """
    if not path.exists():
        return False
    try:
        _check(path, mark)
    # Whatever a changed byte causes.
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if say:
            print(f"{path}: the cache was altered or damaged and is made again ({reason})", file=sys.stderr)
        return False
    # A cache of an earlier version has no hashes of its pictures.
    changed = picture_hashes.changed(str(read_json(path / META, limit=MAX_DATA_BYTES).get("pictures", "")))
    if changed is not None and say:
        print(f"{printable(changed)}: changed since it was encoded: the cache is made again", file=sys.stderr)
    return changed is None


def _check(path: Path, mark: str) -> None:
    """Refuse a cache whose files do not agree with ``meta.json`` or with each other.

    The small arrays are hashed. The tiles may be hundreds of gigabytes, so only their size is checked.
    """
    meta = read_json(path / META, limit=MAX_DATA_BYTES)
    if set(meta) - TOLD or (meta["version"], meta["fingerprint"]) != (ENCODING_VERSION, mark):
        raise UserError(f"{META} is about another cache")
    samples, sums = meta["samples"], meta.get("sha256", {})  # an older cache has no checksums
    arrays = {}
    for name, dtype in ARRAYS.items():
        file = path / f"{name}.npy"
        if file.stat().st_size != meta["bytes"][name]:
            raise UserError(f"{file.name} has another size")
        if name in sums and file_sha256(file) != sums[name]:
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
            raise UserError(f"{META}: 'bad' lists {row!r}")


def file_sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
