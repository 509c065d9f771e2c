"""``mmmamba data build``: the built-in sources as folders of JSONL and pictures.

::

    DIR/easy-vqa/{train,test}.jsonl, images/
    DIR/primer/train-{scene,read,text,recall-1x,recall-4x,recall-16x}.jsonl, validation.jsonl, test.jsonl, images/
    DIR/manifest.json

A source appears under its name only when it is whole, with a ``source.json`` that says what it was made from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mmmamba.data.sources import easyvqa
from mmmamba.data.sources.primer import dataset as primer
from mmmamba.device import MOST_WORKERS, cores
from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json
from mmmamba.locks import alone_in
from mmmamba.outputs import check_folder
from mmmamba.progress import Terminal
from mmmamba.version import __version__

SOURCES = ("easy-vqa", "primer")
RECORD = "source.json"
MANIFEST = "manifest.json"
MOST_SCALE = 1000  # 20 million samples


def build(
    *,
    out: Path,
    source: tuple[str, ...] = SOURCES,
    scale: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
    mixture: Mapping[str, float] | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Make the built-in training, validation and test data.

    There are two sources. easy-vqa is a published set: 4,000 + 1,000 pictures of one shape, 38,575 + 9,673 questions.
    It needs ``pip install easy-vqa==1.0``. primer is generated: reading, counting, relations, what is absent, recall
    over three lengths, and tasks without a picture. Some words, numbers and scenes are kept for validation and test;
    training never sees them.

    The same seed gives the same data for any number of workers. A source that is already complete is kept. A source
    that is incomplete is made again.

    Example::

        mmmamba data build --out data/nano
        mmmamba data build --out data/small --source primer --scale 0.1

    Args:
        out: The folder to build in. Each source gets a folder in it.
        source: Which sources to make: easy-vqa, primer.
        scale: Size of the primer. 1 makes 20,000 training records and, for each ability, 50 validation and 200 test
            records. Validation and test stop growing at 2.5 and don't shrink below 1. The size of easy-vqa is fixed.
        seed: Decides everything random.
        workers: Processes that make records. Default: one for each core.
        mixture: Weights of the primer's training files: scene, read, text, recall-1x, recall-4x, recall-16x. A file
            that is left out isn't made. Default: 38 30 12 12 6 2.
        tokenizer: Folder with the tokenizer.json that measures lengths for recall. Default: the tokenizer that
            mmmamba teach trains.

    Returns:
        ``out``.
    """
    _check(source, scale, workers, mixture)
    mixture = dict(primer.MIXTURE if mixture is None else mixture)
    workers = cores() if workers is None else workers
    definition = None if tokenizer is None else _definition(Path(tokenizer))
    root = Path(out)

    def write_easy(folder: Path) -> dict[str, int]:
        return easyvqa.write(folder, seed)

    def write_primer(folder: Path) -> dict[str, int]:
        parts = primer.plan(scale, mixture)
        return primer.write(folder, parts, seed=seed, workers=workers, tokenizer=definition)

    makers: dict[str, tuple[Callable[[Path], dict[str, int]], dict[str, Any], tuple[str, ...]]] = {
        "easy-vqa": (write_easy, {"seed": seed}, ("easy-vqa",)),
        "primer": (
            write_primer,
            {
                "seed": seed,
                "scale": float(scale),
                "mixture": {group: float(weight) for group, weight in mixture.items()},
                "generator": primer.GENERATOR,
                "tokenizer": None if tokenizer is None else _fingerprint(definition or ""),
            },
            ("pillow", "matplotlib", "tokenizers"),
        ),
    }
    try:
        check_folder(root)
        # If two runs find the data missing, one makes it. The other waits, then finds it.
        with alone_in(root, wait=True):
            _check_manifest(root / MANIFEST)
            for name in dict.fromkeys(source):
                maker, settings, packages = makers[name]
                _build_source(root / name, maker, settings, packages)
                _write_manifest(root)  # after each source, so that at most one is missing from it
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}") from error
    return root


def _check_manifest(path: Path) -> None:
    """Refuse a folder whose manifest was not written by us: it would be replaced."""
    if path.exists() and "sources" not in read_json(path):
        raise UserError(f"{path}: exists, but was not written by mmmamba data build; choose another --out")


def _build_source(
    folder: Path, maker: Callable[[Path], dict[str, int]], settings: Mapping[str, Any], packages: tuple[str, ...]
) -> None:
    """Make one source in a temporary folder, which is renamed when it is complete."""
    console = Terminal(stderr=True)
    if folder.exists():
        _check_same(folder, settings)
        console.print(f"{folder}: already there", soft_wrap=True)
        return
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # of a killed run
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        counts = maker(partial)
        versions = {"mmmamba": __version__, **{package: metadata.version(package) for package in packages}}
        _write_json(partial / RECORD, {"settings": dict(settings), "records": counts, "versions": versions})
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    console.print(f"{folder}: {sum(counts.values()):,} records", soft_wrap=True)


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to pass off what is there as what was asked for."""
    record = folder / RECORD
    if not record.is_file():
        raise UserError(
            f"{folder}: is there, but was not made by mmmamba data build (no {RECORD}); choose another --out"
        )
    there = _read_record(record)["settings"]
    other = [f"{key} {there.get(key)}, not {value}" for key, value in settings.items() if there.get(key) != value]
    if other:
        raise UserError(f"{folder}: was made with {'; '.join(other)}. Remove that folder or choose another --out")


def _write_manifest(root: Path) -> None:
    """Gather what the finished sources say of themselves."""
    records = {name: _read_record(root / name / RECORD) for name in SOURCES if (root / name / RECORD).is_file()}
    partial = root / f".{MANIFEST}.partial"
    _write_json(partial, {"sources": records})
    os.replace(partial, root / MANIFEST)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove the folder to build it again") from error
    if not isinstance(record.get("settings"), dict):
        raise UserError(f"{path}: has no 'settings'; remove the folder to build it again")
    return record


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _check(sources: tuple[str, ...], scale: float, workers: int | None, mixture: Mapping[str, float] | None) -> None:
    if isinstance(sources, str):
        raise UserError(f"source: must be a list of names, got the text '{sources}'")
    for name in sources:
        _check_name("source", name, SOURCES)
    if not sources:
        raise UserError(f"source: name at least one of {', '.join(SOURCES)}")
    if not 0 < scale <= MOST_SCALE:
        raise UserError(f"scale: must be above 0 and at most {MOST_SCALE}, got {scale}")
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"workers: must be from 1 to {MOST_WORKERS}, got {workers}")
    for group, weight in (mixture or {}).items():
        _check_name("mixture", group, tuple(primer.MIXTURE))
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"mixture: the weight of {group} must be 0 or above, got {weight}")
    if mixture is not None and sum(mixture.values()) == 0:
        raise UserError("mixture: at least one weight must be above 0")


def _check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(known)}"
        raise UserError(f"{field}: no '{name}' ({hint})")


def _definition(folder: Path) -> str:
    from mmmamba.data.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder).definition


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
