"""Writes the primer: records as JSONL, pictures as PNG. The files are the same for any number of processes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mmmamba.data.sources.primer import ABILITIES, GROUPS, Example, Meter, corpus_texts, make
from mmmamba.data.sources.primer.recall import SPANS
from mmmamba.progress import Progress

GENERATOR = 2  # raise it when the same seed gives other records
MIXTURE: Mapping[str, float] = {
    "scene": 38,
    "read": 30,
    "text": 12,
    "recall-1x": 12,
    "recall-4x": 6,
    "recall-16x": 2,
}
TRAIN_RECORDS, VALIDATION_RECORDS, TEST_RECORDS = 20_000, 50, 200  # at scale 1; the latter two for each ability
LARGEST_SCALE = 2.5  # of validation and test; and they don't shrink: a small training set is no reason to measure less
MEASURED_LENGTH = "recall-16x"  # long to answer: its validation and test don't grow at all
CHUNK = 200  # records of one task
IMAGES_PER_FOLDER = 2_000
_SLOW = {group: rank for rank, group in enumerate(SPANS, start=1)}  # by length
VOCABULARY = 640  # of the tokenizer that lengths are measured with, when none is given


@dataclass(frozen=True, kw_only=True)
class Part:
    """``count`` records of one group, to be written into ``file``."""

    file: str
    split: str
    group: str
    count: int


def plan(scale: float, mixture: Mapping[str, float] = MIXTURE) -> tuple[Part, ...]:
    """All parts, in the order of the files and of the records within each file."""
    total = sum(mixture.values())
    parts = []
    for group in GROUPS:
        if weight := mixture.get(group, 0):
            count = max(1, round(TRAIN_RECORDS * scale * weight / total))
            parts.append(Part(file=f"train-{group}.jsonl", split="train", group=group, count=count))
    growth = min(max(scale, 1.0), LARGEST_SCALE)
    for split, records in (("validation", VALIDATION_RECORDS), ("test", TEST_RECORDS)):
        for ability in ABILITIES:
            count = records if ability == MEASURED_LENGTH else round(records * growth)
            parts.append(Part(file=f"{split}.jsonl", split=split, group=ability, count=count))
    return tuple(parts)


def write(
    folder: Path, parts: tuple[Part, ...], *, seed: int, workers: int, tokenizer: str | None = None
) -> dict[str, int]:
    """Write every part into ``folder``.

    Args:
        workers: processes; 1 works in this one. Any number gives the same bytes.
        tokenizer: the content of the ``tokenizer.json`` that measures lengths; None trains one, as `teach` does.

    Returns:
        How many records each file holds.
    """
    chunks = [
        _Chunk(part=part, start=start, stop=min(start + CHUNK, part.count), name=f"{number:03d}-{start:08d}.jsonl")
        for number, part in enumerate(parts)
        for start in range(0, part.count, CHUNK)
    ]
    pieces = folder / "parts"
    pieces.mkdir(parents=True)
    if workers == 1:
        definition = tokenizer or train_tokenizer()
        with Progress("primer", total=sum(part.count for part in parts)) as bar:
            for chunk in chunks:
                bar.advance(_write_chunk(chunk, folder, seed, definition))
    else:
        pool = ProcessPoolExecutor(max_workers=workers, initializer=_start_worker)
        try:
            # Trained in a worker: a process that has trained one can't be forked without a warning from the library.
            definition = tokenizer or pool.submit(train_tokenizer).result()
            _write_chunks(pool, chunks, folder, seed, definition)
        finally:
            pool.shutdown(cancel_futures=True)
    counts = _concatenate(folder, chunks)
    shutil.rmtree(pieces)
    return counts


def train_tokenizer() -> str:
    """The definition of the tokenizer that a recipe trains unless it says otherwise."""
    from mmmamba.data.bpe_training import train_bpe

    return train_bpe(corpus_texts(), VOCABULARY).to_str()


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Records ``start`` to ``stop`` of a part; ``name`` is that of its own JSONL file."""

    part: Part
    start: int
    stop: int
    name: str


def _write_chunks(pool: Executor, chunks: list[_Chunk], folder: Path, seed: int, definition: str) -> None:
    # The slow ones first, so that no process is left alone with them at the end; all before the bar starts its thread.
    slow_first = sorted(chunks, key=lambda chunk: _SLOW.get(chunk.part.group, 0), reverse=True)
    futures: list[Future[int]] = [pool.submit(_write_chunk, chunk, folder, seed, definition) for chunk in slow_first]
    with Progress("primer", total=sum(chunk.stop - chunk.start for chunk in chunks)) as bar:
        for future in as_completed(futures):
            bar.advance(future.result())


def _start_worker() -> None:
    """The parent alone answers an interrupt; and a worker must not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    # Else it would go on with the queue, in a folder that the next run already writes to, and then wait forever.
    os._exit(1)


def _write_chunk(chunk: _Chunk, folder: Path, seed: int, definition: str) -> int:
    meter = _meter(definition)
    part = chunk.part
    with (folder / "parts" / chunk.name).open("w", encoding="utf-8", newline="\n") as file:
        for i in range(chunk.start, chunk.stop):
            example = make(seed, part.split, part.group, i, meter)
            images = _save_pictures(example, folder, part, i)
            file.write(json.dumps(_record(example, part, i, images), ensure_ascii=False) + "\n")
    return chunk.stop - chunk.start


@functools.lru_cache(maxsize=1)
def _meter(definition: str) -> Meter:
    """One a process, for its memory of words."""
    from mmmamba.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(definition)
    return Meter(lambda text: len(tokenizer.encode(text, allow_special=False)))


def _save_pictures(example: Example, folder: Path, part: Part, i: int) -> list[str]:
    """Save them in folders of a bounded size; returns the paths, from ``folder`` on."""
    most = SPANS[part.group].pictures[1] if part.group in SPANS else 1
    place = f"images/{part.split}-{part.group}/{i // (IMAGES_PER_FOLDER // most):04d}"
    paths = []
    for number, picture in enumerate(example.pictures, start=1):
        if number == 1:
            (folder / place).mkdir(parents=True, exist_ok=True)
        paths.append(f"{place}/{i}.png" if most == 1 else f"{place}/{i}-{number}.png")
        picture.render().save(folder / paths[-1], compress_level=1)
    return paths


def _record(example: Example, part: Part, i: int, images: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"id": f"primer-{part.split}-{part.group}-{i:07d}"}
    if images:
        record["image"] = images[0] if len(images) == 1 else images
    record["conversations"] = [
        {"from": speaker, "value": text}
        for turn in example.turns
        for speaker, text in (("human", turn.question), ("gpt", turn.answer))
    ]
    record["ability"] = example.ability
    if part.split != "train":
        record["chance"] = example.chance
    return record


def _concatenate(folder: Path, chunks: list[_Chunk]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, pieces in _by_file(chunks):
        with (folder / name).open("wb") as whole:
            for chunk in pieces:
                with (folder / "parts" / chunk.name).open("rb") as piece:
                    shutil.copyfileobj(piece, whole)
        counts[name] = sum(chunk.stop - chunk.start for chunk in pieces)
    return counts


def _by_file(chunks: list[_Chunk]) -> Iterator[tuple[str, list[_Chunk]]]:
    for name in dict.fromkeys(chunk.part.file for chunk in chunks):
        yield name, [chunk for chunk in chunks if chunk.part.file == name]
