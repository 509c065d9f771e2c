"""``mmmamba data check``: a conversation set read end to end, as training would read it, before training does.

A sample is read, its pictures are decoded and tiled, its conversation becomes tokens; what goes wrong is listed and the
next one is read. Of what was read only sums, counts by value and one number a line stay in memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmmamba.data.encoded_cache import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import UNSCORED, Processor
from mmmamba.data.sample import BadSample, NothingScored
from mmmamba.data.tiling import check_tiles
from mmmamba.data.workers import ordered
from mmmamba.device import MOST_WORKERS, cores
from mmmamba.errors import UserError
from mmmamba.locks import alone_in
from mmmamba.outputs import Ledger, check_folder
from mmmamba.progress import Progress
from mmmamba.report.plot_style import PALETTE, new_figure, render, style
from mmmamba.report.table import Table, show, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LENGTH = 4096  # what a recipe's data.max_length is when it is left out
SHOWN = 20  # bad samples that are printed; the report file has them all
KINDS = 200  # kinds of badness that are counted apart
SLOWEST = 5
BINS = 12
VERB = "data check"
FILES = ("check.png", "check.svg", "check.md", "check.json")  # what --out holds
BAR = 24  # characters of the longest bar
_ROWS = 16  # samples that a worker reads before it reports


def check(
    file: Path,
    *,
    teacher: str = "nano-teacher",
    workers: int | None = None,
    max_length: int = MAX_LENGTH,
    max_tiles: int | None = None,
    out: Path | None = None,
) -> None:
    """Read a whole conversation set as training would, and say what is in it and what is wrong with it.

    Every line is parsed, every picture decoded and cut into tiles, every conversation made into the teacher's tokens. A
    bad sample is listed with its file, line and reason, and the reading goes on. For example:

        mmmamba data check mydata/train.jsonl --teacher pico-teacher --out runs/check

    It counts samples, pictures and turns, shows how long samples are, how many tiles they take and how many are cut,
    what share of the tokens is scored, which ids come twice, and how fast samples can be read. When any sample is bad,
    the last line says how many and the exit code is 2.

    Args:
        file: the JSONL file.
        teacher: a folder or built-in name; its tokenizer, template and picture settings are what counts.
        workers: processes that read (default: one a core; 0 reads in this one).
        max_length: tokens of a sample, as a recipe's data.max_length; a longer text tail is cut.
        max_tiles: tiles of a picture, as a recipe's data.max_tiles (default: the teacher's own limit).
        out: a folder for check.json (with every bad sample), check.md, check.png and check.svg.

    Raises:
        UserError: when a sample is bad, after all have been read; when the file or the teacher can't be read at all.
    """
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers must be from 0 to {MOST_WORKERS}, got {workers}")
    if max_length is not None and max_length < 1:
        raise UserError(f"--max-length must be at least 1, got {max_length}")
    check_tiles(max_tiles, "--max-tiles")
    if out is not None:
        check_folder(out)
        Ledger(out, VERB).check(FILES, read=[file], otherwise="give another --out")
    dataset = JsonlDataset(file)
    if len(dataset) == 0:
        raise UserError(f"{file}: holds no sample")
    source = EncodedSource(dataset, Processor.from_folder(teacher), max_length=max_length, max_tiles=max_tiles)
    with BadList() as bad:
        found = {
            "file": str(file),
            "teacher": teacher,
            "max_length": max_length,
            "max_tiles": max_tiles,
            **survey(source, bad, cores() if workers is None else workers),
        }
        for table in tables(found, bad):
            show(table)
        if out is not None:
            write_report(found, bad, out)
    if bad.count:
        listed = "" if out is None else f"; all are listed in {out / 'check.json'}"
        raise UserError(f"{file}: {bad.count:,} of {len(dataset):,} samples {_are(bad.count)} bad{listed}")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


# ---------------------------------------------------------------------------------------------- reading


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
            except UserError as error:  # of no one sample
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
    """64 bits that are never 0; among ten million ids two different ones meet with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


class BadList:
    """Bad samples in the order of their lines: counted, grouped by kind, and spooled to a file however many there are.

    Attributes:
        count: how many.
        kinds: kind of badness → how many.
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
        """All of them as the items of a JSON list, in blocks of text."""
        self._spool.seek(0)
        return iter(lambda: self._spool.read(1 << 20), "")


def kind(reason: str) -> str:
    """What a reason has in common with others: field and complaint, without numbers, paths and particulars."""
    head = ": ".join(reason.split(": ")[:2])
    head = re.sub(r" ?\([^()]*\)| ?/\S+", "", head)
    return re.sub(r"\d+", "N", head)[:100]


def survey(source: EncodedSource, bad: BadList, workers: int = 0) -> dict[str, Any]:
    """Read all of ``source`` in ``workers`` processes; bad samples go to ``bad``.

    Returns:
        plain data: counts, histograms, duplicate ids, and ``speed``, the only part that depends on time and workers.

    Raises:
        UserError: for what is wrong with the request and not with a sample.
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
    """Ids that come more than once: how many, on how many samples, and the first few with their first lines."""
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
    """How many there are, their quantiles and a histogram; of none there is no quantile (None)."""
    return {
        "samples": sum(counts.values()),
        "median": quantile(counts, 0.5),
        "p90": quantile(counts, 0.9),
        "p99": quantile(counts, 0.99),
        "largest": max(counts, default=None),
        "histogram": [{"from": a, "to": b, "samples": n} for a, b, n in histogram(counts)],
    }


def quantile(counts: Mapping[int, int], share: float) -> int | None:
    """The least value that at least ``share`` of the counted ones do not exceed; None of none."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 1e-9:
            return value
    return None


def histogram(counts: Mapping[int, int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """(first value, last value, how many) of at most ``bins`` bins of one round width.

    The last one reaches to the largest value, so that a few very large ones do not squeeze the others into one bin.
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


# ---------------------------------------------------------------------------------------------- the report

NONE = "–"  # in place of a figure that would be made of nothing
PANELS = {"lengths": "Tokens of a sample, before cutting", "tiles": "Tiles of a sample", "cut": "Tokens cut off"}


def _share(scored: float | None) -> str:
    return "" if scored is None else f", {100 * scored:.1f} % scored"


def _spread(lengths: Mapping[str, Any]) -> str:
    found = [f"{name} {lengths[name]:,}" for name in ("median", "p90", "p99", "largest") if lengths[name] is not None]
    return ", ".join(found) or NONE


def tables(found: Mapping[str, Any], bad: BadList) -> list[Table]:
    """What a survey found, as tables; the first :data:`SHOWN` bad samples come last."""
    lengths, cut, speed, twice = found["lengths"], found["cut"], found["speed"], found["duplicates"]
    limit = "the teacher's own" if found["max_tiles"] is None else found["max_tiles"]
    rows: list[Sequence[Any]] = [
        ("read as", f"{found['teacher']}; at most {found['max_length']:,} tokens, tiles: {limit}"),
        ("samples", f"{found['samples']:,}: {found['good']:,} good, {found['bad']:,} bad"),
        ("pictures", f"{found['images']:,}"),
        ("turns", f"{found['turns']:,}"),
        ("tokens", f"{found['tokens']:,}" + _share(found["scored_share"])),
        ("tokens of a sample", _spread(lengths)),
        ("samples cut", f"{cut['samples']:,}; {cut['tokens']:,} tokens lost"),
        ("samples with nothing scored", f"{found['nothing_scored']:,}"),
        ("ids that come twice", f"{twice['ids']:,}, on {twice['samples']:,} samples" if twice["ids"] else "0"),
        *(("", f"{one['id']!r}, lines {', '.join(map(str, one['lines']))}") for one in twice["examples"]),
        (
            "speed",
            f"{speed['samples_a_minute']:,.0f} samples a minute in all ({max(speed['workers'], 1)} at once)"
            + ("" if speed["samples_a_minute_a_worker"] is None
               else f", {speed['samples_a_minute_a_worker']:,.0f} a worker"),
        ),
        ("slowest", ", ".join(f"line {one['line']} ({one['seconds']:.3g} s)" for one in speed["slowest"])),
    ]  # fmt: skip
    shown = [table_of(str(found["file"]), ("", "found"), rows)]
    for key, title in PANELS.items():
        bars = found[key]["histogram"]
        if bars:
            largest = max(bar["samples"] for bar in bars)
            rows = [
                (
                    str(bar["from"]) if bar["from"] == bar["to"] else f"{bar['from']:,} to {bar['to']:,}",
                    bar["samples"],
                    f"{100 * bar['samples'] / found[key]['samples']:.1f} %",
                    "█" * -(-BAR * bar["samples"] // largest),
                )
                for bar in bars
            ]
            shown.append(table_of(title, (key, "samples", "share", ""), rows))
    if bad.count:
        shown.append(table_of("What is wrong", ("reason", "samples"), found["bad_kinds"].items()))
        more = "" if bad.count <= SHOWN else f", the first {SHOWN} of {bad.count:,}"
        rows = [(f"{found['file']}:{line}", reason) for line, reason in bad.first]
        shown.append(table_of(f"Bad samples{more}", ("where", "reason"), rows))
    return shown


def write_report(found: Mapping[str, Any], bad: BadList, out: Path) -> None:
    """Write check.json, check.md, check.png and check.svg into ``out``; check.json has every bad sample."""

    def write_json(path: Path) -> None:
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        with path.open("w", encoding="utf-8") as file:
            file.write(text.removesuffix("\n}") + ',\n  "bad_samples": [')
            for block in bad.blocks():
                file.write(block)
            file.write("\n  ]\n}\n" if bad.count else "]\n}\n")

    page = "\n".join(
        ["# What is in the data, and what is wrong with it", "", "![Histograms](check.svg)", ""]
        + [table.markdown(level=2) for table in tables(found, bad)]
        + ([] if bad.count <= SHOWN else ["`check.json` lists every bad sample.", ""])
    )
    figure = plot(found)
    with alone_in(out):
        Ledger(out, VERB).write(
            {
                "check.png": render(figure, "png"),
                "check.svg": render(figure, "svg"),
                "check.md": page.encode(),
                "check.json": write_json,  # the last, so that its presence means the rest is there
            }
        )


def plot(found: Mapping[str, Any]) -> Figure:
    """A panel for each histogram that has something in it."""
    panels = {key: title for key, title in PANELS.items() if found[key]["histogram"]} or {"lengths": PANELS["lengths"]}
    figure = new_figure(4.6 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title), colour in zip(axes, panels.items(), PALETTE, strict=False):
        bars = found[key]["histogram"]
        axis.bar(range(len(bars)), [bar["samples"] for bar in bars], 0.9, color=colour)
        names = [f"{bar['from']:,}" for bar in bars]
        if bars and bars[-1]["to"] - bars[-1]["from"] > bars[0]["to"] - bars[0]["from"]:
            names[-1] = f"≥ {names[-1]}"
        axis.set_xticks(range(len(bars)), names, rotation=45 if len(bars) > 6 else 0)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_ylabel("samples")
        style(axis)
    return figure
