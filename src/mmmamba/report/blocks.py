"""Marked blocks of Markdown pages, which are filled from the results that their first mark names.

A block lies between two marks, each on a line of its own::

    <!-- bench: protocol, steps of efficiency-h100.json -->
    …
    <!-- /bench -->

The first word says which verb fills it. Then come what is wanted, the file (as seen from the page), and optionally one
word and another file (``beyond OTHER.json``). Marks in a code fence are examples and are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmmamba.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Block:
    """What the first mark of a block asks for, and where the mark is.

    Attributes:
        parts: what is wanted from ``file``.
        how, other: the word and the file after that; '' where there are none.
    """

    page: Path
    line: int
    parts: tuple[str, ...]
    file: str
    how: str = ""
    other: str = ""

    def path(self, name: str) -> Path:
        """A file that the mark names.

        Raises:
            UserError: when there is no such file.
        """
        return beside(self.page, name)


def find_blocks(page: Path, verb: str, form: str) -> list[Block]:
    """The blocks that ``verb`` fills.

    Args:
        page: a Markdown file.
        verb: the word in the marks.
        form: what a first mark holds, for messages, such as ``TABLE of FILE.jsonl``.

    Raises:
        UserError: for a mark that has no partner or another form, naming page and line.
    """
    mark = re.compile(rf"<!-- {verb}: (?P<parts>[^<>]+?) of (?P<file>\S+)(?: (?P<how>[a-z]+) (?P<other>\S+))? -->")
    close = f"<!-- /{verb} -->"
    found: list[Block] = []
    opened, fenced = 0, False
    for number, line in enumerate(read_page(page).split("\n"), start=1):
        fenced ^= line.startswith("```")
        if fenced:
            continue
        if match := mark.fullmatch(line):
            if opened:
                raise UserError(f"{page}:{number}: a block begins inside the one of line {opened}; end it with {close}")
            opened = number
            parts = tuple(part.strip() for part in match["parts"].split(","))
            how, other = match["how"] or "", match["other"] or ""
            found.append(Block(page=page, line=number, parts=parts, file=match["file"], how=how, other=other))
        elif line == close:
            if not opened:
                raise UserError(f"{page}:{number}: a block ends here that never began")
            opened = 0
        elif line.startswith(f"<!-- {verb}"):
            raise UserError(f"{page}:{number}: a block begins with <!-- {verb}: {form} -->")
    if opened:
        raise UserError(f"{page}:{opened}: the block that begins here has no end; write {close} after it")
    return found


def fill_blocks(page: Path, verb: str, form: str, make: Callable[[Block], str]) -> str:
    """The page with every block of ``verb`` replaced by what ``make`` returns; the file is left as it is.

    Raises:
        UserError: as :func:`find_blocks`; an error of ``make`` is raised again with the block's page and line.
    """
    blocks = {block.line: block for block in find_blocks(page, verb, form)}
    lines: list[str] = []
    inside = False
    for number, line in enumerate(read_page(page).split("\n"), start=1):
        inside = inside and line != f"<!-- /{verb} -->"
        if inside:
            continue
        lines.append(line)
        if number in blocks:
            try:
                content = make(blocks[number])
            except UserError as error:
                raise UserError(f"{page}:{number}: {error}") from error
            lines += ["", *content.rstrip("\n").split("\n"), ""]
            inside = True
    return "\n".join(lines)


def read_page(page: Path) -> str:
    if not page.is_file():
        raise UserError(f"{page}: {'is a folder, not a page' if page.is_dir() else 'no such file'}")
    return page.read_text(encoding="utf-8")


def beside(page: Path, name: str) -> Path:
    """The file that a page calls ``name``.

    Raises:
        UserError: when there is no such file.
    """
    path = page.parent / name
    if not path.is_file():
        raise UserError(f"there is no {path}")
    return path
