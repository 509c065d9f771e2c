"""Names from a user's files that become parts of paths. They are checked, or made into unique file names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 100  # bytes: file systems allow 255, and suffixes are added


def check_name(text: str, what: str) -> str:
    """``text``, if it is safe as one part of a path.

    Raises:
        ValueError: it would lead out of its folder, be hidden, or contain what no file name should.
    """
    if not text.strip():
        raise ValueError(f"{what} is empty")
    if "/" in text or "\\" in text or text in (".", ".."):
        raise ValueError(f"{what} {text!r:.80} must be a name, not a path")
    if text[0] in ".-~ " or text[-1] in ". ":
        raise ValueError(f"{what} {text!r:.60} must not begin with one of '.-~ ' or end with '.' or ' '")
    if any(unicodedata.category(character)[0] == "C" or character in "\u2028\u2029" for character in text):
        raise ValueError(f"{what} {text!a:.80} holds a control character")
    if len(text.encode()) > LONGEST:
        raise ValueError(f"{what} {text!r:.40} is longer than {LONGEST} bytes")
    return text


def file_labels(labels: Iterable[str]) -> dict[str, str]:
    """Each label as part of a file name. No two are equal, even on a file system that ignores case."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for label in labels:
        plain = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", label)).strip("-.") or "model"
        stem = plain.encode()[:LONGEST].decode(errors="ignore")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        found[label] = name
    return found


def unique(label: str, taken: Iterable[str]) -> str:
    """``label``, with a number if it is taken."""
    known, name, number = set(taken), label, 1
    while name in known:
        number += 1
        name = f"{label} ({number})"
    return name
