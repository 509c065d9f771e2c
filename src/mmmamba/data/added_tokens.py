"""The added tokens of a tokenizer's folder, merged from its files as transformers merges them.

Three files may name them: ``tokenizer.json`` (``added_tokens``), ``tokenizer_config.json`` (``added_tokens_decoder``)
and ``added_tokens.json``. A token is *special* or not. A special token is never read from a user's text, and is never
shown. The others (``<think>``, runs of spaces) are read and shown like any text. A token that has a role
(``bos_token``, ``eos_token``, …) is special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmmamba.errors import UserError
from mmmamba.jsonfile import read_json

CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
NAMES_FILE = "special_tokens_map.json"
#: The names of the roles that a token can have, in transformers' order.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]
"""An entry of ``added_tokens`` in a ``tokenizer.json``: ``content`` and the flags."""


def token(content: str, *, special: bool = True, normalized: bool | None = None, **flags: bool) -> Token:
    """An entry. By default, a special token is matched before the text is normalised, any other token after."""
    named = {"single_word": False, "lstrip": False, "rstrip": False, **flags}
    return {"content": content, **named, "normalized": not special if normalized is None else normalized,
            "special": special}  # fmt: skip


def declared(folder: Path, config: Mapping[str, Any]) -> dict[int, Token]:
    """id → token, from ``added_tokens_decoder`` in ``config`` and from ``added_tokens.json`` in ``folder``.

    Raises:
        UserError: for anything but tokens under ids, or for two texts with one id.
    """
    where = folder / CONFIG_FILE
    decoder = {} if config.get("added_tokens_decoder") is None else config["added_tokens_decoder"]
    if not isinstance(decoder, dict):
        raise UserError(f"{where}: 'added_tokens_decoder' must be a JSON object")
    found: dict[int, Token] = {}
    for index, entry in decoder.items():
        entry = {"content": entry} if isinstance(entry, str) else entry
        content = entry.get("content") if isinstance(entry, dict) else None
        if not re.fullmatch("[0-9]{1,9}", index) or not isinstance(content, str) or not content:
            raise UserError(f"{where}: 'added_tokens_decoder': '{index}' must be a number and have a 'content'")
        flags = {name: entry[name] for name in _FLAGS if name in entry}
        for name, value in flags.items():
            if type(value) is not bool:
                raise UserError(f"{where}: 'added_tokens_decoder': '{index}': '{name}' must be true or false")
        found[int(index)] = token(content, **{"special": False, **flags})
    named = named_tokens(config)
    for content, i in if_any(folder / ADDED_FILE).items():
        if type(i) is not int or i < 0 or not content:
            raise UserError(f"{folder / ADDED_FILE}: '{content}' must have an id, got {i!r}")
        if found.setdefault(i, token(content, special=content in named))["content"] != content:
            raise UserError(
                f"{folder / ADDED_FILE}: the id {i} is '{content}' here and '{found[i]['content']}' in {CONFIG_FILE}"
            )
    return found


def named_tokens(config: Mapping[str, Any]) -> set[str]:
    """The texts to which ``config`` gives a role, or which it lists as special."""
    more = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    found = [value for key, value in config.items() if key.endswith("_token")]
    for entries in more:
        found += list(entries.values()) if isinstance(entries, dict) else entries if isinstance(entries, list) else []
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str) and text}


def merged(definition: dict[str, Any], folder: Path, config: Mapping[str, Any]) -> bool:
    """Add to the ``added_tokens`` of a ``tokenizer.json``, in place, what the files beside it say.

    ``added_tokens_decoder`` overrides ``tokenizer.json``, which overrides ``added_tokens.json``. A token that is only
    named by its role is added if the vocabulary has it.

    Returns:
        whether this changed anything.

    Raises:
        UserError: if the files give one token two ids, or one id two tokens.
    """
    added = definition.setdefault("added_tokens", [])
    before = json.dumps(added)
    vocabulary = _vocabulary(definition)
    by_text = {entry["content"]: entry for entry in added}
    by_id = {i: text for text, i in vocabulary.items()} | {entry["id"]: entry["content"] for entry in added}
    first_free = 1 + max(by_id, default=-1)
    decoder = bool(config.get("added_tokens_decoder"))
    for i, entry in sorted(declared(folder, config).items()):
        text, where = entry["content"], folder / (CONFIG_FILE if decoder else ADDED_FILE)
        known = by_text[text]["id"] if text in by_text else vocabulary.get(text, i)
        if known != i or by_id.get(i, text) != text:
            other = f"'{text}' has the id {known}" if known != i else f"the id {i} is '{by_id[i]}'"
            raise UserError(f"{where}: the id {i} is '{text}' here, but in tokenizer.json {other}")
        if text in by_text:
            special = entry["special"] or by_text[text]["special"]  # special if any of the files says so
            by_text[text].update({**entry, "special": special} if decoder else {})
            continue
        if i not in by_id and i != first_free:
            raise UserError(f"{where}: the added token '{text}' has the id {i}, the next one free is {first_free}")
        first_free, by_id[i] = max(first_free, i + 1), text
        by_text[text] = {"id": i, **entry}
        added.append(by_text[text])
    for text in sorted(named_tokens(config) & vocabulary.keys() - by_text.keys(), key=vocabulary.__getitem__):
        added.append({"id": vocabulary[text], **token(text)})
    return json.dumps(added) != before


def if_any(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _vocabulary(definition: Mapping[str, Any]) -> dict[str, int]:
    """text → id of the model's own vocabulary, without added tokens."""
    vocabulary = definition.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # a unigram model: [[text, score], …]
        return {text: i for i, (text, _) in enumerate(vocabulary)}
    return dict(vocabulary)
