"""Reads every sample of a data set as training would, and counts what is in it.

Only sums, counts by value and one number for each line stay in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import UNSCORED
from mmmamba.data.sample import BadSample, NothingScored
from mmmamba.data.workers import ordered
from mmmamba.errors import UserError
from mmmamba.progress import Progress

SHOWN = 20  # bad samples that are printed; the report file has them all
KINDS = 200  # kinds of mistakes that are counted separately
SLOWEST = 5
BINS = 12
_ROWS = 16  # samples that a worker reads before it reports


@dataclass
class Tally:
    """What consecutive samples, from row ``start`` on, amount to.

    Attributes:
        images, turns, tokens, scored: of the good samples; tokens after cutting.
        lengths: tokens of a good sample before cutting → how many samples.
        tiles: tiles of a good sample → how many samples.
        cut: tokens that a sample lost to ``max_length`` → how many samples, 0 left out.
        unscored: samples, good or bad, of which nothing is scored.
        bad: (row, reason) of each bad sample.
        ids: a hash of each sample's id, 0 where there is none or the line could not be parsed.
        seconds: (s,) what each sample took.
        error: what ends the reading.
    """

    start: int
    images: int = 0
    turns: int = 0
    tokens: int = 0
    scored: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    tiles: Counter[int] = field(default_factory=Counter)
    cut: Counter[int] = field(default_factory=Counter)
    unscored: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: UserError | None = None


class _Tallies:
    """Chunk number → the tally of its rows."""

    def __init__(self, source: EncodedSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // _ROWS)

    def __getitem__(self, chunk: int) -> Tally:
        tally = Tally(chunk * _ROWS)
        for row in range(tally.start, min(tally.start + _ROWS, len(self.source))):
            began = time.perf_counter()
            tally.ids.append(0)
            try:
                self._read(row, tally)
            except BadSample as error:
                tally.unscored += isinstance(error, NothingScored)
                tally.bad.append((row, str(error).removeprefix(f"{self.source.dataset.where(row)}: ")))
            except UserError as error:  # not about one sample
                tally.error = error
                return tally
            tally.seconds.append(time.perf_counter() - began)
        return tally

    def _read(self, row: int, tally: Tally) -> None:
        source = self.source
        sample = source.dataset[row]
        tally.ids[-1] = _hash(sample.id) if sample.named else 0
        encoded = source.processor.encode(sample, max_length=source.max_length, max_tiles=source.max_tiles)
        scored = int((encoded.labels != UNSCORED).sum())
        tally.images += len(sample.images)
        tally.turns += len(sample.turns)
        tally.tokens += len(encoded.input_ids)
        tally.scored += scored
        tally.unscored += scored == 0
        tally.lengths[len(encoded.input_ids) + encoded.cut] += 1
        tally.tiles[len(encoded.tiles)] += 1
        if encoded.cut:
            tally.cut[encoded.cut] += 1


def _hash(name: str) -> int:
    """A hash of 64 bits that is never 0. Among ten million ids, the chance of any collision is 3 in a million."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


class BadList:
    """Bad samples in the order of their lines. They are counted, grouped by kind, and written to a temporary file.

    Attributes:
        count: how many.
        kinds: kind of mistake → how many.
        first: the first :data:`SHOWN` of them, as (line, reason).
    """

    def __init__(self) -> None:
        self.count = 0
        self.kinds: Counter[str] = Counter()
        self.first: list[tuple[int, str]] = []
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")

    def __enter__(self) -> BadList:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, line: int, reason: str) -> None:
        self._spool.write(("," if self.count else "") + "\n    ")
        json.dump({"line": line, "reason": reason}, self._spool, ensure_ascii=False)
        self.count += 1
        name = kind(reason)
        self.kinds[name if name in self.kinds or len(self.kinds) < KINDS else "anything else"] += 1
        if len(self.first) < SHOWN:
            self.first.append((line, reason))

    def blocks(self) -> Any:
        """All bad samples as the items of a JSON list, in blocks of text."""
        self._spool.seek(0)
        return iter(lambda: self._spool.read(1 << 20), "")


def kind(reason: str) -> str:
    """The kind of a reason: its field and complaint, without numbers, paths and details."""
    head = ": ".join(reason.split(": ")[:2])
    head = re.sub(r" ?\([^()]*\)| ?/\S+", "", head)
    return re.sub(r"\d+", "N", head)[:100]


def survey(source: EncodedSource, bad: BadList, workers: int = 0) -> dict[str, Any]:
    """Read all of ``source`` in ``workers`` processes. Bad samples are added to ``bad``.

    Returns:
        plain data: counts, histograms, duplicate ids, and ``speed``. Only ``speed`` depends on time and workers.

    Raises:
        UserError: something is wrong with the request, not with a sample.
    """
    dataset, tallies = source.dataset, _Tallies(source)
    total = Tally(0)
    ids = np.zeros(len(source), dtype=np.uint64)
    seconds = 0.0
    slowest: list[tuple[float, int]] = []
    workers = min(workers, len(tallies))
    began = time.perf_counter()
    # Workers are forked here, before the progress bar starts its thread.
    chunks = ordered(tallies.__getitem__, 0, len(tallies), workers=workers, ahead=4)
    with closing(chunks), Progress(f"checking {dataset.path}", total=len(source)) as progress:
        for tally in chunks:
            if tally.error is not None:
                raise tally.error
            for name in ("images", "turns", "tokens", "scored", "unscored"):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            for name in ("lengths", "tiles", "cut"):
                getattr(total, name).update(getattr(tally, name))
            for row, reason in tally.bad:
                bad.add(_line(dataset, row), reason)
            ids[tally.start : tally.start + len(tally.ids)] = tally.ids
            seconds += sum(tally.seconds)
            slowest = heapq.nlargest(SLOWEST, [*slowest, *((s, tally.start + i) for i, s in enumerate(tally.seconds))])
            progress.advance(len(tally.seconds), bad=bad.count)
    wall = time.perf_counter() - began
    return {
        "samples": len(source),
        "good": len(source) - bad.count,
        "bad": bad.count,
        "bad_kinds": dict(bad.kinds.most_common()),
        "images": total.images,
        "turns": total.turns,
        "tokens": total.tokens,
        "scored_tokens": total.scored,
        "scored_share": round(total.scored / total.tokens, 6) if total.tokens else None,
        "nothing_scored": total.unscored,
        "lengths": _distribution(total.lengths),
        "tiles": _distribution(total.tiles),
        "cut": {"tokens": sum(n * count for n, count in total.cut.items()), **_distribution(total.cut)},
        "duplicates": _duplicates(dataset, ids),
        "speed": {
            "workers": workers,
            "seconds": round(wall, 3),
            "samples_a_minute": round(60 * len(source) / wall, 1),
            "samples_a_minute_a_worker": round(60 * len(source) / seconds, 1) if seconds else None,
            "slowest": [{"line": _line(dataset, row), "seconds": round(took, 4)} for took, row in slowest],
        },
    }


def _line(dataset: JsonlDataset, row: int) -> int:
    return int(dataset.where(row).rpartition(":")[2])


def _duplicates(dataset: JsonlDataset, ids: np.ndarray) -> dict[str, Any]:
    """Ids that occur more than once: how many, on how many samples, and the first few with their first lines."""
    known = np.flatnonzero(ids)
    _, first, counts = np.unique(ids[known], return_index=True, return_counts=True)
    several = counts > 1
    examples = [known[i] for i in sorted(first[several])[:SLOWEST]]
    return {
        "ids": int(several.sum()),
        "samples": int(counts[several].sum()),
        "examples": [
            {
                "id": dataset[int(row)].id,
                "lines": [_line(dataset, int(other)) for other in np.flatnonzero(ids == ids[row])[:SLOWEST]],
            }
            for row in examples
        ],
    }


# ---------------------------------------------------------------------------------------------- histograms


def _distribution(counts: Mapping[int, int]) -> dict[str, Any]:
    """How many there are, their quantiles (None if there are none) and a histogram."""
    return {
        "samples": sum(counts.values()),
        "median": quantile(counts, 0.5),
        "p90": quantile(counts, 0.9),
        "p99": quantile(counts, 0.99),
        "largest": max(counts, default=None),
        "histogram": [{"from": a, "to": b, "samples": n} for a, b, n in histogram(counts)],
    }


def quantile(counts: Mapping[int, int], share: float) -> int | None:
    """The smallest value that at least ``share`` of all values do not exceed. None if there are no values."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 1e-9:
            return value
    return None


def histogram(counts: Mapping[int, int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """At most ``bins`` bins of one round width, each as (first value, last value, how many).

    The last bin reaches up to the largest value, so that a few very large values do not push all others into one bin.
    """
    if not counts:
        return []
    least, bulk, most = min(counts), quantile(counts, 0.99), max(counts)
    assert bulk is not None
    widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    width = next(width for width in widths if bulk // width - least // width < bins)
    found: Counter[int] = Counter()
    for value, count in counts.items():
        found[min(value // width, least // width + bins - 1)] += count
    numbers = range(least // width, max(found) + 1)
    ends = [(number + 1) * width - 1 for number in numbers]
    ends[-1] = max(ends[-1], most)
    return [(number * width, end, found[number]) for number, end in zip(numbers, ends, strict=True)]
