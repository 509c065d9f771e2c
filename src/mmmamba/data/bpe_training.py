"""Trains a byte-level BPE tokenizer on text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmmamba.data.chat_template import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from mmmamba.errors import UserError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPECIALS = (UNK, BOS, EOS, "<|im_start|>", "<|im_end|>", IMAGE_START, IMAGE_END, IMAGE_CONTEXT)


def train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """Train a byte-level BPE that splits numbers into digits. ``specials`` get the first ids, in their order.

    All 256 bytes are in the vocabulary, so every text survives encoding and decoding, seen in training or not.
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
