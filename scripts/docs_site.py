"""What the docs site needs beyond the pages in docs/: a hook of MkDocs, and an extension of its API reference.

    mkdocs build --strict        # what make docs runs; mkdocs.yml names this file

The hook adds pages that are kept elsewhere: CONTRIBUTING.md, CHANGELOG.md, the README of each operator, and a page of
API reference for each package. A link in one of them to a file that is not on the site becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mmmamba"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
SHARED_ENTRY = re.compile(r"^( {4,8})(\w+(?:, \w+)+)(: .*(?:\n\1 .*)*)\n?", re.MULTILINE)  # of two parameters or more


def pages() -> dict[str, Path]:
    """Return each page that is kept outside docs/: its place on the site → its file."""
    found = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
    found["operators/index.md"] = PACKAGE / "ops" / "README.md"
    found |= {f"operators/{file.parent.name}.md": file for file in sorted((PACKAGE / "ops").glob("*/README.md"))}
    return {place: file for place, file in found.items() if file.exists()}


def references() -> dict[str, str]:
    """Return each page of API reference: its place on the site → its text."""
    packages = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    modules = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_"))
    found = {"reference/index.md": "# mmmamba\n\n::: mmmamba\n    options: {show_submodules: false}\n"}
    found |= {f"reference/{name}.md": f"# {name}\n\n::: mmmamba.{name}\n" for name in packages}
    listed = "\n".join(f"::: mmmamba.{name}\n" for name in modules)
    return {**found, "reference/modules.md": f"# Single modules\n\n{listed}"}


def moved(text: str, file: Path, place: str) -> str:
    """Return a page's text with its relative links as they are on the site at ``place``."""
    places = {kept: where for where, kept in pages().items()}

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        path, sharp, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        leads_to = (file.parent / path).resolve()
        if leads_to.is_relative_to(ROOT / "docs"):
            on_site = leads_to.relative_to(ROOT / "docs").as_posix()
        elif leads_to in places:
            on_site = places[leads_to]
        else:
            return words
        return f"{picture}[{words}]({posixpath.relpath(on_site, posixpath.dirname(place) or '.')}{sharp}{anchor})"

    parts = FENCE.split(text)  # every second one is a fence
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def anchor(heading: str, separator: str = "-") -> str:
    """Return a heading's anchor, by the rule of the hosts that show these pages."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


# ---------------------------------------------------------------------------------------------- called by MkDocs


def on_config(config: Any) -> None:
    """Give headings the anchors that links in the pages use."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor


def on_files(files: Any, config: Any) -> None:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for place, file in pages().items():
        text = moved(file.read_text(encoding="utf-8"), file, place)
        files.append(File.generated(config, place, content=text))
    for place, text in references().items():
        files.append(File.generated(config, place, content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let Markdown be read inside ``<details>``, as the hosts of these pages do."""
    return markdown.replace("<details>", '<details markdown="1">')


# ---------------------------------------------------------------------------------------------- called by mkdocstrings


def plain(docstring: str) -> str:
    """Return a docstring as the API reference reads it.

    Roles such as ``:func:`x``` become code, and ``::`` before a block becomes a colon. An entry for two parameters
    (``a, b: text``) becomes an entry for each.
    """
    docstring = re.sub(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`", r"`\1`", docstring)
    docstring = re.sub(r"^( *)Example::$", r"\1For example:", docstring, flags=re.MULTILINE)
    docstring = re.sub(r"::$", ":", docstring, flags=re.MULTILINE)
    return SHARED_ENTRY.sub(
        lambda match: "".join(f"{match[1]}{name}{match[3]}\n" for name in match[2].split(", ")), docstring
    )


try:
    import griffe
except ImportError:  # only the tests of the functions above come here
    pass
else:

    class PlainRoles(griffe.Extension):
        """Reads the docstrings of the package as Markdown."""

        def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
            """Rewrite one object's docstring."""
            if obj.docstring:
                obj.docstring.value = plain(obj.docstring.value)
