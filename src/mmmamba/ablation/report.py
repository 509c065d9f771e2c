"""Tables inside a Markdown page: blocks between two marks, made of the results that the first mark names.

::

    <!-- ablation: stages of nano-ablation.jsonl -->
    …
    <!-- /ablation -->

The file lies beside the page, and so do the plots (``nano-ablation-stages.svg``). Nothing else of a page is touched.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmmamba.ablation.journal import Results, read
from mmmamba.ablation.tables import markdown
from mmmamba.errors import UserError

_OPEN = re.compile(r"^<!-- ablation: (?P<table>\S+) of (?P<file>\S+) -->$")
_CLOSE = "<!-- /ablation -->"


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(number of the line of its mark, table, results file) of each block; what stands in a code fence is none.

    Raises:
        UserError: for a mark that has no partner, naming page and line.
    """
    found: list[tuple[int, str, str]] = []
    opened, fenced = 0, False
    for number, line in enumerate(_lines(page), start=1):
        fenced ^= line.startswith("```")
        if fenced:
            continue
        if match := _OPEN.match(line):
            if opened:
                raise UserError(
                    f"{page}:{number}: a block begins inside the one of line {opened}; end it with {_CLOSE}"
                )
            opened = number
            found.append((number, match["table"], match["file"]))
        elif line == _CLOSE:
            if not opened:
                raise UserError(f"{page}:{number}: a block ends here that never began")
            opened = 0
        elif line.startswith("<!-- ablation"):
            raise UserError(f"{page}:{number}: a block begins with <!-- ablation: TABLE of FILE.jsonl -->")
    if opened:
        raise UserError(f"{page}:{opened}: the block that begins here has no end; write {_CLOSE} behind it")
    return found


def filled(page: Path) -> str:
    """The page with every block made anew from its results, as it should stand in the file."""
    known: dict[str, Results] = {}
    starts = {number: (table, file) for number, table, file in blocks(page)}
    lines: list[str] = []
    inside = False
    for number, line in enumerate(_lines(page), start=1):
        inside = inside and line != _CLOSE
        if inside:
            continue
        lines.append(line)
        if number in starts:
            table, file = starts[number]
            if file not in known:
                path = page.parent / file
                if not path.is_file():
                    raise UserError(f"{page}:{number}: there is no {path}")
                known[file] = read(path)
            try:
                content = markdown(known[file], table, image=f"{plot_name(Path(file).stem, table)}.svg")
            except UserError as error:
                raise UserError(f"{page}:{number}: {error}") from error
            lines += ["", *content.rstrip("\n").split("\n"), ""]
            inside = True
    return "\n".join(lines)


def plot_name(stem: str, table: str) -> str:
    """Of a table's plot beside the page, without its suffix."""
    return f"{stem}-{table}"


def _lines(page: Path) -> list[str]:
    if not page.is_file():
        raise UserError(f"{page}: {'is a folder, not a page' if page.is_dir() else 'no such file'}")
    return page.read_text(encoding="utf-8").split("\n")
