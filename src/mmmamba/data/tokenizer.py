"""Text to token ids and back. No text can produce a special token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import tokenizers

from mmmamba.data import sentencepiece
from mmmamba.data.added_tokens import ADDED_FILE, CONFIG_FILE, NAMES_FILE, ROLES, declared, if_any
from mmmamba.data.bpe_training import BOS, EOS, UNK
from mmmamba.data.tokenizer_definition import parts_of, with_added, without_first_space
from mmmamba.errors import UserError
from mmmamba.foreign_links import refuse_foreign_link
from mmmamba.jsonfile import MAX_TOKENIZER_BYTES, parse, read_bytes, read_json, read_text

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
TEMPLATE_FILE = "chat_template.jinja"

STRETCH = 1 << 16
"""Characters that are tokenised at once, if a text can be cut."""
MAX_STRETCH = 1 << 20
"""Characters that may be tokenised at once if a text cannot be cut: the library takes up to 600 bytes for each."""
WORD_END = re.compile(r"[A-Za-z](?=[ \n][A-Za-z])")


class Tokenizer:
    """A thin wrapper of ``tokenizers.Tokenizer``, made from its JSON text.

    Added tokens work as in transformers: those with ``special: false`` are read in any text and shown, according to
    their flags (``lstrip``, ``rstrip``, ``single_word``, ``normalized``). Special ones are never read from text. Tokens
    with a role (``bos_token``, …) are always special.

    Args:
        definition: the content of a ``tokenizer.json``.
        config: the content of ``tokenizer_config.json``. If it is left out, :meth:`save` writes a minimal one.
        where: named in error messages.
        withheld: added tokens that are treated as special, whatever the definition says.
    """

    def __init__(
        self,
        definition: str,
        config: dict[str, Any] | None = None,
        where: str = TOKENIZER_FILE,
        withheld: Iterable[str] = (),
    ) -> None:
        self._definition = definition
        self._config = config
        self._where = where
        self._withheld = frozenset(withheld)
        self._special_names = self._withheld.union(self.named_tokens.values() if config is not None else ())
        self._tokenizer = self._build(definition)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in self._added.items() if token.special}
        unknown = self._special_ids.get(getattr(self._tokenizer.model, "unk_token", None) or UNK)
        # (the unknown token replaces characters, so it may come from text).
        self._withheld_ids = frozenset(self._special_ids.values()) - {unknown}

    @classmethod
    def from_bpe(cls, bpe: tokenizers.Tokenizer) -> Tokenizer:
        """Wrap one that was just trained (see :func:`mmmamba.data.bpe_training.train_bpe`)."""
        return cls(bpe.to_str())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a folder: ``tokenizer.json``, else a sentencepiece ``tokenizer.model``."""
        path, model = Path(folder) / TOKENIZER_FILE, Path(folder) / SENTENCEPIECE_FILE
        from mmmamba.checkpoints.gguf import find_gguf, gguf_tokenizer  # a lazy import: checkpoints are above data

        gguf = find_gguf(folder)
        if gguf is not None:  # a GGUF file has everything; nothing beside it is read
            return cls(*gguf_tokenizer(gguf), str(gguf))
        for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE, CONFIG_FILE, NAMES_FILE, ADDED_FILE, TEMPLATE_FILE):
            refuse_foreign_link(Path(folder) / name)
        if not path.is_file() and not model.is_file():
            raise UserError(f"{folder}: no {TOKENIZER_FILE} and no {SENTENCEPIECE_FILE}")
        config_path = Path(folder) / CONFIG_FILE
        config = read_json(config_path) if config_path.is_file() else None
        if not path.is_file():
            found = cls._from_sentencepiece(model, config or {})
        else:
            names = if_any(path.with_name(NAMES_FILE))
            # An older folder, which names the roles in this file.
            if names and not (config or {}).get("added_tokens_decoder"):
                config = {**(config or {}), **names}
            found = cls(with_added(path, config or {}), config, str(path))
        template = Path(folder) / TEMPLATE_FILE
        if template.is_file():
            own = found._config if found._config is not None else found._default_config()
            found._config = {**own, "chat_template": read_text(template)}
        return found

    @classmethod
    def _from_sentencepiece(cls, path: Path, config: dict[str, Any]) -> Tokenizer:
        """As InternLM2's and Llama's tokenizer classes read ``path`` and the files beside it."""
        model = sentencepiece.parse(read_bytes(path, limit=MAX_TOKENIZER_BYTES), str(path))
        names = path.with_name(NAMES_FILE)
        bpe = sentencepiece.to_fast(
            model,
            declared(path.parent, {**if_any(names), **config}),
            str(path),
            add_bos=config.get("add_bos_token") is not False,
            add_eos=config.get("add_eos_token") is True,
        )
        roles = {"unk_token": model.unk_id, "bos_token": model.bos_id, "eos_token": model.eos_id}
        own = {role: bpe.id_to_token(i) for role, i in roles.items() if 0 <= i < len(model.pieces)}
        merged = {**own, **if_any(names), **config}
        for key in ("added_tokens_decoder", "auto_map", "sp_model_kwargs", "legacy"):
            merged.pop(key, None)  # the definition has it now, or only the slow class uses it
        for role in ("unk_token", "bos_token", "eos_token", "pad_token"):  # written as a text, or as an object
            if isinstance(merged.get(role), dict):
                merged[role] = merged[role].get("content")
        merged |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return cls(bpe.to_str(), merged, str(path))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers' fast tokenizers read them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / TOKENIZER_FILE).write_text(self._definition, encoding="utf-8")
        config = self._config if self._config is not None else self._default_config()
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def definition(self) -> str:
        """The ``tokenizer.json`` text."""
        return self._definition

    @property
    def identity(self) -> str:
        """What a fingerprint of this tokenizer covers: its definition and, if an added token has flags, which are
        special.

        (Earlier versions never read tokens that are not special from text.)
        """
        plain = all(t.special and not (t.lstrip or t.rstrip or t.single_word) for t in self._added.values())
        return self._definition + ("" if plain else f"\nadded tokens by their flags, {sorted(self._special_ids)}")

    @property
    def where(self) -> str:
        """The file it was read from."""
        return self._where

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id. Ids may have gaps."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise UserError(f"{self._where}: the tokenizer has no token '{token}'")
        return index

    def encode(
        self, text: str, allow_special: bool = True, after: Literal["start", "special", "text"] = "start"
    ) -> list[int]:
        """Token ids, with nothing added. Without ``allow_special``, the name of a special token is plain text.

        ``after`` says what comes before the text in its prompt: nothing, a special token, or other text. Tokenizers
        that put a space before a text do so at the start. Some also do so after special tokens, and none in the middle.

        Raises:
            UserError: the text has more than a million characters that cannot be cut.
        """
        spaced = after == "start" or (after == "special" and not self._space_at_start_only)
        ids: list[int] = []
        for stretch in [text] if allow_special else self._stretches(text):
            if len(stretch) > MAX_STRETCH:
                raise UserError(
                    f"{len(stretch):,} characters without the end of a word of letters, where they could be cut; at "
                    f"most {MAX_STRETCH:,} are tokenised at once"
                )
            ids += self._ids(stretch, allow_special, spaced)
            spaced = False
        return ids

    def _ids(self, text: str, allow_special: bool, spaced: bool) -> list[int]:
        """The ids of ``text``. Without ``spaced``, no space is put before it (one may be put after an added token)."""
        whole, bare = self._libraries(allow_special)
        encoding = self._encoded(whole if spaced else bare, text)
        ids: list[int] = encoding.ids
        if not allow_special and not self._withheld_ids.isdisjoint(ids):
            return self._spelt_out(ids, encoding.offsets, text)
        if spaced or bare is whole or self._space_at_start_only:
            return ids
        found = next((i for i, token in enumerate(ids) if token in self._added), None)
        if found is None:
            return ids
        rest = text[encoding.offsets[found][1] :]
        return ids[: found + 1] + (self._encoded(whole, rest).ids if rest else [])

    def _encoded(self, library: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        """The library's encoding of ``text``. A definition that it accepted may still fail at some texts."""
        try:
            return library.encode(text, add_special_tokens=False)
        except BaseException as error:  # a panic in the library is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self._where}: the tokenizer fails at this text ({error})") from error

    def _spelt_out(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> list[int]:
        """``ids``, with special tokens replaced by their characters: such a name may be a word of the vocabulary."""
        _, bare = self._libraries(False)
        found: list[int] = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            apart = text[start:end] if token in self._withheld_ids and end - start > 1 else ""
            found += [i for one in apart for i in self._encoded(bare, one).ids] if apart else [token]
        return found

    def strips(self, token: str) -> tuple[bool, bool]:
        """Whether a special token removes the white space before it, and after it."""
        added = self._added.get(self.token_id(token))
        return (False, False) if added is None else (added.lstrip, added.rstrip)

    def _stretches(self, text: str) -> Iterator[str]:
        """Cut ``text`` into parts whose ids, one after another, are the ids of the whole.

        The library needs some hundred bytes for each token while it works, so a long text is not tokenised at once.
        """
        start = 0
        while len(text) - start > STRETCH and self._keeps_to_words:
            end = WORD_END.search(text, start + STRETCH)
            if end is None:
                break
            yield text[start : end.end()]
            start = end.end()
        yield text[start:]

    @cached_property
    def _keeps_to_words(self) -> bool:
        """Whether a text can be cut after a word: no token continues from a letter to a space or a new line."""
        across = re.compile(
            "[A-Za-z][ \n\u2581\u0120\u010a]"
        )  # as they are, and as sentencepiece and byte-level BPE write them
        if any(across.search(token) for token in self._tokenizer.get_vocab(with_added_tokens=True)):
            return False
        if any(not token.special and (token.rstrip or token.single_word) for token in self._added.values()):
            return False  # these depend on the text before or after them
        library, bare = self._libraries(False)
        whole, first, rest = (
            tokenizer.encode(text, add_special_tokens=False).ids
            for tokenizer, text in ((library, "a b\nc"), (library, "a"), (bare, " b\nc"))
        )
        return bool(whole == first + rest)  # false if the ends of a text are trimmed

    def _libraries(self, allow_special: bool) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """The library's tokenizer, and one that puts no space before a text. ``allow_special`` goes for both."""
        if allow_special not in self._pairs:
            bare = without_first_space(parse(self._definition))
            same = bare == parse(self._definition)
            whole = self._build(self._definition, allow_special) if allow_special else self._tokenizer
            self._pairs[allow_special] = (whole, whole if same else self._build(json.dumps(bare), allow_special))
        return self._pairs[allow_special]

    @cached_property
    def _pairs(self) -> dict[bool, tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]]:
        return {}

    def _build(self, definition: str, allow_special: bool = False) -> tokenizers.Tokenizer:
        """The library's tokenizer. Tokens with a role are special; special tokens are read from text if allowed."""
        try:
            content = parse(definition)
            for token in content.get("added_tokens", []):
                token["special"] = token["special"] or token["content"] in self._special_names
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
            # The library also accepts a part as a list of its values, but no tool writes that.
            if not all(isinstance(part, dict) for part in parts_of(content)):
                raise TypeError("a normalizer or pre-tokenizer is no mapping")
        except Exception as error:  # the library raises a bare Exception for a malformed definition
            raise UserError(f"{self._where}: not a usable tokenizer definition: {error}") from error
        tokenizer.encode_special_tokens = not allow_special
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _space_at_start_only(self) -> bool:
        return any(part.get("prepend_scheme") == "first" for part in parts_of(parse(self._definition)))

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that came with the tokenizer."""
        template = (self._config or {}).get("chat_template")
        if isinstance(template, list):  # several, by name
            entries = [entry for entry in template if isinstance(entry, dict)]
            template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise UserError(f"{self._where}: 'chat_template' of {CONFIG_FILE} must be a text")
        return template

    @property
    def named_tokens(self) -> dict[str, str]:
        """``bos_token``, ``eos_token``, … → the token, for those that ``tokenizer_config.json`` names."""
        found: dict[str, Any] = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in (self._config if self._config is not None else self._default_config()).items()
            if name in ROLES and token is not None
        }
        for name, token in found.items():
            if not isinstance(token, str):
                raise UserError(f"{self._where}: '{name}' of {CONFIG_FILE} must be a text")
        return found

    @property
    def specials(self) -> tuple[str, ...]:
        """Every special token."""
        return tuple(self._special_ids)

    @property
    def others(self) -> tuple[str, ...]:
        """Every added token that is not special."""
        return tuple(token.content for token in self._added.values() if not token.special)

    def withholding(self, tokens: Iterable[str]) -> Tokenizer:
        """This tokenizer, with those of ``tokens`` that are added tokens made special: no text can produce them."""
        if not set(tokens).intersection(self.others):
            return self
        return Tokenizer(self._definition, self._config, self._where, self._withheld.union(tokens))

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts ``bos_token`` before a text (which :meth:`encode` never does)."""
        ids, bos = self._tokenizer.encode("a", add_special_tokens=True).ids, self.named_tokens.get("bos_token")
        return bool(ids) and bos is not None and ids[0] == self._special_ids.get(bos)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids. If special tokens are shown, the ids between two of them are decoded separately."""
        ids = [int(i) for i in ids]
        if skip_special:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        special = set(self._special_ids.values())
        texts = groupby(ids, key=special.__contains__)
        return "".join(self._tokenizer.decode(list(text), skip_special_tokens=False) for _, text in texts)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, dict[str, Any] | None, str, frozenset[str]]]:
        # The wrapped object loses `encode_special_tokens` when it is pickled, so each worker builds a new one.
        return (Tokenizer, (self._definition, self._config, self._where, self._withheld))

    def _default_config(self) -> dict[str, Any]:
        named = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": EOS}
        present = {key: token for key, token in named.items() if token in self._special_ids}
        others = [token for token in self._special_ids if token not in present.values()]
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **present,
            "additional_special_tokens": others,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        }
