"""A user's text inside a Markdown page: shown as it is, never read as HTML, a link, a picture or a new block."""

from __future__ import annotations

import re
from html import escape

from mmmamba.errors import printable


def text(value: str) -> str:
    """``value`` in running text or a table's cell, on one line."""
    shown = re.sub(r"([\\`*|])", r"\\\1", escape(printable(value), quote=False))
    # Brackets matter where they make a link or a picture; intervals ("[0.1, 0.2]") stay readable.
    return re.sub(r"\[(?=[^\[\]]*\][(\[:])|(?<=!)\[", r"\\[", shown)


def code(value: str) -> str:
    """``value`` as a code span; it may hold anything."""
    shown = printable(value) or " "
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
