"""README.md and docs/*.md as what a test can check: fences, commands, tables, links, headings."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Fence:
    """A fenced block; ``where`` is ``page:line`` of its first line."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command line of a ``sh`` fence, as words."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def fences(kind: str, pages: tuple[Path, ...] = PAGES) -> list[Fence]:
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match[1] == kind:
                found.append(Fence(page, text[: match.start()].count("\n") + 2, kind, match[2]))
    return found


def commands(*programs: str, pages: tuple[Path, ...] = PAGES) -> list[Command]:
    """Every command of the ``sh`` fences whose first word is among ``programs``."""
    found = []
    for fence in fences("sh", pages):
        for number, line in enumerate(fence.text.replace("\\\n", "  ").splitlines()):
            words = shlex.split(line, comments=True)
            if words and words[-1] == "&":
                words.pop()
            if words and words[0] in programs:
                found.append(Command(f"{fence.page.relative_to(ROOT)}:{fence.line + number}", tuple(words)))
    return found


def prose(page: Path) -> str:
    """The page without its fences and comments."""
    return _COMMENT.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))


def code_spans(page: Path) -> list[str]:
    return _CODE.findall(prose(page))


def links(page: Path) -> list[str]:
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    _, found, rest = prose(page).partition(f"# {heading}\n")
    assert found, f"{page.name} has no heading '{heading}'"
    lines = re.search(r"(^\|.*\n)+", rest, re.MULTILINE)
    assert lines, f"{page.name}: no table under '{heading}'"
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[0].splitlines()[2:]]
