"""The content of a ``tokenizer.json``: its parts, and the two changes that we make to it before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmmamba.data.added_tokens import merged
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_TOKENIZER_BYTES, parse, read_text


def parts_of(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizers and pre-tokenizers of a definition. A sequence is given as its members."""
    found: list[dict[str, Any]] = []
    for kind, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = definition.get(kind) or {}
        sequence = isinstance(part, dict) and part.get("type") == "Sequence"
        found += part[members] if sequence else [part]
    return found


def without_first_space(definition: dict[str, Any]) -> dict[str, Any]:
    """``definition``, changed so that nothing is put before a text."""
    for part in parts_of(definition):
        if part.get("type") == "Prepend":
            part["prepend"] = ""
        elif part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        elif part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    return definition


def with_added(path: Path, config: dict[str, Any]) -> str:
    """The text of a ``tokenizer.json``, with the added tokens of the files beside it. Unchanged if they agree."""
    text = read_text(path, limit=MAX_TOKENIZER_BYTES)
    try:
        content = parse(text)
        changed = merged(content, path.parent, config)
    except UserError:
        raise
    except Exception as error:  # a definition of another form may cause anything
        raise UserError(f"{path}: not a usable tokenizer definition: {error}") from error
    return json.dumps(content, ensure_ascii=False) if changed else text
