"""``mmmamba data check``: read a conversation set from end to end, as training would, before training does."""

from __future__ import annotations

from pathlib import Path

from mmmamba.data.check_report import FILES, VERB, tables, write_report
from mmmamba.data.check_survey import BadList, survey
from mmmamba.data.encoded_source import EncodedSource
from mmmamba.data.jsonl import JsonlDataset
from mmmamba.data.processor import Processor
from mmmamba.data.tiling import check_tiles
from mmmamba.device import MOST_WORKERS, cores
from mmmamba.errors import UserError
from mmmamba.outputs import Ledger, check_folder
from mmmamba.report.table import show

MAX_LENGTH = 4096  # the default of data.max_length in a recipe


def check(
    file: Path,
    *,
    teacher: str = "nano-teacher",
    workers: int | None = None,
    max_length: int = MAX_LENGTH,
    max_tiles: int | None = None,
    out: Path | None = None,
) -> None:
    """Read a whole data set as training would, and report what is in it and what is wrong with it.

    Every line is parsed, every picture is decoded and cut into tiles, and every conversation becomes the teacher's
    tokens. A bad sample is listed with its file, line and reason; then the next one is read. For example:

        mmmamba data check mydata/train.jsonl --teacher pico-teacher --out runs/check

    The report counts samples, pictures and turns. It shows how long samples are, how many tiles they take and how many
    are cut, what share of the tokens is scored, which ids occur twice, and how fast samples can be read. If any sample
    is bad, the last line says how many, and the exit code is 2.

    Args:
        file: the JSONL file.
        teacher: a folder or built-in name. Its tokenizer, template and picture settings are used.
        workers: processes that read (default: one for each core; 0 reads in this process).
        max_length: most tokens of a sample, like data.max_length in a recipe. Longer texts are cut at the end.
        max_tiles: most tiles of a picture, like data.max_tiles in a recipe (default: the teacher's own limit).
        out: a folder for check.json (with every bad sample), check.md, check.png and check.svg.

    Raises:
        UserError: a sample is bad (after all have been read), or the file or the teacher can't be read at all.
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
