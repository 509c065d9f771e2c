"""Reads a sentencepiece ``tokenizer.model`` as a fast tokenizer that gives the same ids for the same text.

Only the BPE kind with byte fallback is read, which InternLM2, Llama and Mistral use. Sentencepiece merges the
neighbours whose joint piece has the highest score, leftmost first. A BPE whose merges are ranked by these scores does
the same. The file is a protocol buffer with few fields, which are parsed here. Formats: sentencepiece's
``sentencepiece_model.proto``; InternLM2's published tokenizer class for the added tokens.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from mmmamba.data.added_tokens import Token
from mmmamba.errors import UserError

log = logging.getLogger(__name__)

SPACE = "▁"

# Kinds of pieces and of models, as sentencepiece numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2
_MODEL_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """One row of the vocabulary. Its id is its position."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The settings of a ``tokenizer.model`` for encoding and decoding.

    Attributes:
        pieces: the vocabulary (v).
        charsmap: sentencepiece's compiled character map (nmt_nfkc and the like), empty for identity. The ``tokenizers``
            library looks up a character together with its combining marks. If only some of them are in the map, its
            result differs from sentencepiece's. Models with byte fallback seldom have a map.
        add_dummy_prefix: a space is put before every text, and removed when decoding.
        remove_extra_whitespaces: spaces at both ends are dropped, runs of them become one.
        unk_id, bos_id, eos_id: ids of the pieces with these parts, -1 for none.
    """

    pieces: tuple[Piece, ...]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    unk_id: int
    bos_id: int
    eos_id: int


def parse(data: bytes, where: str) -> SentencePieceModel:
    """Read the bytes of a ``tokenizer.model``.

    Args:
        where: the file, named in error messages.

    Raises:
        UserError: the file is damaged, or its kind of model is not supported.
    """
    try:
        model = _merged(data)
        trainer, normaliser, denormaliser = (_merged(b"".join(_messages(model, field))) for field in (2, 3, 5))
        pieces = tuple(map(_piece, _messages(model, 1)))
        kind = _int(trainer, 3, 1)
        parsed = SentencePieceModel(
            pieces=pieces,
            charsmap=_bytes(normaliser, 2),
            add_dummy_prefix=bool(_int(normaliser, 3, 1)),
            remove_extra_whitespaces=bool(_int(normaliser, 4, 1)),
            unk_id=_int(trainer, 40, 0),
            bos_id=_int(trainer, 41, 1),
            eos_id=_int(trainer, 42, 2),
        )
        denormalises = bool(_bytes(denormaliser, 2))
        whitespace_as_suffix, escapes = _int(trainer, 24, 0), _int(normaliser, 5, 1)
    except (IndexError, ValueError) as error:
        raise UserError(f"{where}: not a sentencepiece model, or a damaged one") from error
    if not pieces:
        raise UserError(f"{where}: not a sentencepiece model: it has no pieces")
    if kind != _BPE:
        raise UserError(f"{where}: a sentencepiece model of type '{_MODEL_KINDS.get(kind, kind)}'; only 'bpe' is read")
    if whitespace_as_suffix:
        raise UserError(f"{where}: 'treat_whitespace_as_suffix' is not supported")
    if not escapes:
        raise UserError(f"{where}: 'escape_whitespaces: false' is not supported")
    if denormalises:
        raise UserError(f"{where}: a sentencepiece model with rules for denormalising is not supported")
    byte_pieces = {piece.text for piece in pieces if piece.kind == BYTE}
    missing = [name for name in map("<0x{:02X}>".format, range(256)) if name not in byte_pieces]
    if missing:
        raise UserError(
            f"{where}: no byte fallback (no piece {missing[0]}): text of unknown characters could not come back"
        )
    if not 0 <= parsed.unk_id < len(pieces):
        raise UserError(f"{where}: unk_id {parsed.unk_id} is not the id of a piece")
    return parsed


def to_fast(
    model: SentencePieceModel,
    added: Mapping[int, Token],
    where: str,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
) -> tokenizers.Tokenizer:
    """The model as a fast tokenizer.

    If text spells a user-defined symbol of several characters, it is read as that symbol, in sentencepiece and here:
    such a symbol becomes an added token that is not special. If a space is put before every text, one is also put after
    such a symbol, as transformers does (sentencepiece does not).

    Args:
        added: id → the tokens that were added to the model (see :mod:`mmmamba.data.added_tokens`). A token with the id
            of a piece replaces that piece (this is how InternLM2 names its spare pieces). The other ids must start
            where the pieces end.
        where: the file, named in error messages.
        add_bos, add_eos: what ``add_special_tokens=True`` puts around a text.
    """
    texts = [added[i]["content"] if i in added else piece.text for i, piece in enumerate(model.pieces)]
    tokens = {i: AddedToken(piece.text, normalized=False, special=piece.kind != USER_DEFINED)
              for i, piece in enumerate(model.pieces) if _is_added(piece)}  # fmt: skip
    tokens |= {i: AddedToken(**{**token, "normalized": False}) for i, token in added.items()}
    vocabulary = {text: i for i, text in enumerate(texts)}
    for i, text in [*enumerate(texts), *((i, token["content"]) for i, token in added.items())]:
        if vocabulary.get(text, i) != i:
            raise UserError(f"{where}: the ids {i} and {vocabulary[text]} are both called '{text}'")
    for i, token in list(tokens.items()):
        if token.special and len(token.content) == 1:
            raise UserError(
                f"{where}: the special token {i} is a single character '{token.content}', which any text may hold"
            )
        if i not in added and not token.special and SPACE in token.content:
            if model.add_dummy_prefix or model.remove_extra_whitespaces:
                raise UserError(f"{where}: the user-defined symbol {i} {token.content!r} with spaces is not supported")
            tokens[i] = AddedToken(token.content, normalized=True, special=False)  # it is spelt as normalised text is
    for expected, i in enumerate(sorted(i for i in added if i >= len(texts)), start=len(texts)):
        if i != expected:
            raise UserError(
                f"{where}: the added token '{added[i]['content']}' has the id {i}, the next one free is {expected}"
            )

    mergeable = {piece.text: piece for i, piece in enumerate(model.pieces) if i not in tokens and _may_merge(piece)}
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, where),
            unk_token=texts[model.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if model.charsmap:
        log.warning("%s: its character map may treat rare combining marks otherwise than sentencepiece does", where)
    bpe.normalizer = normalizers.Sequence(_normalisers(model, where))
    bpe.decoder = decoders.Sequence(_decoders(model))
    bpe.add_tokens([tokens[i] for i in sorted(tokens)])
    bos = [(texts[model.bos_id], model.bos_id)] if add_bos and 0 <= model.bos_id < len(texts) else []
    eos = [(texts[model.eos_id], model.eos_id)] if add_eos and 0 <= model.eos_id < len(texts) else []
    if bos or eos:
        before, after = [text for text, _ in bos], [text for text, _ in eos]
        bpe.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in after)],
            special_tokens=bos + eos,
        )
    return bpe


def _is_added(piece: Piece) -> bool:
    return piece.kind in (UNKNOWN, CONTROL) or (piece.kind == USER_DEFINED and len(piece.text) > 1)


def _may_merge(piece: Piece) -> bool:
    """Whether a piece can be part or result of merges. Sentencepiece never joins user-defined characters."""
    return piece.kind in (NORMAL, UNUSED)


def _merges(pieces: Mapping[str, Piece], where: str) -> list[tuple[str, str]]:
    """All ways to make a piece from two others, best scores first."""
    found: list[tuple[float, str, str]] = []
    lost = []
    for text, piece in pieces.items():
        ways = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in pieces and text[i:] in pieces]
        if ways and piece.kind == UNUSED:
            raise UserError(
                f"{where}: the unused piece '{text}' lies on the way to other pieces, which is not supported"
            )
        if not ways and _joins_unknown(text, pieces):
            lost.append(text)
        found += [(piece.score, left, right) for left, right in ways]
    if lost:
        # Sentencepiece can join characters that are not pieces themselves. A BPE knows such characters only as bytes.
        log.warning(
            "%s: %d pieces hold characters that are no pieces and are never used (%r)", where, len(lost), lost[0]
        )
    found.sort(key=lambda merge: -merge[0])  # stable: equal scores keep the order of the vocabulary
    return [(left, right) for _, left, right in found]


def _joins_unknown(text: str, pieces: Mapping[str, Piece]) -> bool:
    return len(text) > 1 and any(
        all(part in pieces or len(part) == 1 for part in (text[:i], text[i:])) for i in (1, len(text) - 1)
    )


def _normalisers(model: SentencePieceModel, where: str) -> list[normalizers.Normalizer]:
    """Text as sentencepiece sees it before it is cut."""
    rules: list[normalizers.Normalizer] = []
    if model.charsmap:
        try:
            rules.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: its character map is damaged") from error
    if model.remove_extra_whitespaces:
        rules.append(normalizers.Replace(Regex(r"\A +"), ""))
        rules.append(normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), ""))
        rules.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        rules.append(normalizers.Prepend(SPACE))
    return [*rules, normalizers.Replace(" ", SPACE)]


def _decoders(model: SentencePieceModel) -> list[decoders.Decoder]:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.remove_extra_whitespaces:
        steps.append(decoders.Strip(content=" ", left=1 << 16, right=0))
    elif model.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return steps


# ------------------------------------------------------------------------------------- protocol buffer


Fields = dict[int, list["int | bytes"]]


def _piece(raw: bytes) -> Piece:
    fields = _merged(raw)
    score = _bytes(fields, 2) or bytes(4)
    if len(score) != 4:
        raise ValueError("a score is a 32-bit float")
    return Piece(_bytes(fields, 1).decode("utf-8"), struct.unpack("<f", score)[0], _int(fields, 3, NORMAL))


def _int(fields: Fields, field: int, default: int) -> int:
    """An integer, enum or bool field. If it has several values, the last one counts."""
    value = fields.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no integer")
    return value - (1 << 64) if value >= 1 << 63 else value  # a negative int32 is stored as 64 bits


def _bytes(fields: Fields, field: int) -> bytes:
    """A field of bytes; empty if it is missing."""
    return _messages(fields, field)[-1] if field in fields else b""


def _messages(fields: Fields, field: int) -> list[bytes]:
    """Every value of a repeated field."""
    values = [value for value in fields.get(field, []) if isinstance(value, bytes)]
    if len(values) < len(fields.get(field, [])):
        raise ValueError(f"field {field} is an integer")
    return values


def _merged(data: bytes) -> Fields:
    """Field number → its values, in the order of the message."""
    fields: Fields = {}
    for field, value in _fields(data):
        fields.setdefault(field, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("the message ends early")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that starts at ``at``, and where the next thing starts."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("an integer of more than ten bytes")
