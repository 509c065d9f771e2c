"""Text to token ids and back, with special tokens that text alone can never produce."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmmamba.data.template import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from mmmamba.errors import UserError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIALS = (UNK, BOS, EOS, "<|im_start|>", "<|im_end|>", IMAGE_START, IMAGE_END, IMAGE_CONTEXT)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


def train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """Train a byte-level BPE with digits split one by one; ``specials`` take the first ids, in their order.

    All 256 bytes are in the vocabulary, so every text round-trips, seen in training or not.
    """
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} specials take {smallest}")
    bpe = tokenizers.Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


class Tokenizer:
    """A thin wrapper of ``tokenizers.Tokenizer``, made from its JSON text.

    Args:
        definition: the content of a ``tokenizer.json``.
        config: the content of ``tokenizer_config.json``; a minimal one is written by :meth:`save` when omitted.
        where: named in error messages.
    """

    def __init__(self, definition: str, config: dict[str, Any] | None = None, where: str = TOKENIZER_FILE) -> None:
        self._definition = definition
        self._config = config
        self._where = where
        self._tokenizer = _build(definition, where)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: index for index, token in added.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    @classmethod
    def from_bpe(cls, bpe: tokenizers.Tokenizer) -> Tokenizer:
        """Wrap a freshly trained one (see :func:`train_bpe`)."""
        return cls(bpe.to_str())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            hint = ""
            if (Path(folder) / "tokenizer.model").is_file():
                hint = (
                    " (there is a sentencepiece tokenizer.model: save it once as a fast tokenizer with "
                    "transformers, AutoTokenizer.from_pretrained(...).save_pretrained(...))"
                )
            raise UserError(f"{folder}: no {TOKENIZER_FILE}{hint}")
        config_path = Path(folder) / CONFIG_FILE
        config = _read_json(config_path) if config_path.is_file() else None
        return cls(path.read_text(encoding="utf-8"), config, str(path))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, as transformers' fast tokenizers read them."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / TOKENIZER_FILE).write_text(self._definition, encoding="utf-8")
        config = self._config if self._config is not None else self._default_config()
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def definition(self) -> str:
        """The ``tokenizer.json`` text: what a fingerprint of this tokenizer covers."""
        return self._definition

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise UserError(f"{self._where}: the tokenizer has no token '{token}'")
        return index

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids, nothing added. Without ``allow_special`` a special token's name is plain text like any other."""
        if not allow_special or self._split is None:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in self._split.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids.extend(self._tokenizer.encode(part, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, dict[str, Any] | None, str]]:
        # The wrapped object forgets `encode_special_tokens` when pickled, so a worker builds its own.
        return (Tokenizer, (self._definition, self._config, self._where))

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


def _build(definition: str, where: str) -> tokenizers.Tokenizer:
    """The tokenizer with every added token special, and none of them recognised in plain text."""
    try:
        content = json.loads(definition)
        for token in content.get("added_tokens", []):
            token["special"] = True
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception on a malformed definition
        raise UserError(f"{where}: not a usable tokenizer definition: {error}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content
