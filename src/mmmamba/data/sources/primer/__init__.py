"""The primer: small clean tasks, made from a seed, that a tiny model can learn and a bad student forgets.

Record ``i`` of a group is a pure function of (seed, split, group, i). Words, numbers, scenes, tables, sequences and
sums each belong to one split alone (``splits.py``).
"""

from __future__ import annotations

from random import Random

from mmmamba.data.sources.primer import absent, count, mixed, read_lettering, recall, relate, text
from mmmamba.data.sources.primer.corpus import corpus_texts
from mmmamba.data.sources.primer.example import Example, Picture, Turn
from mmmamba.data.sources.primer.length import CountTokens, Meter, estimate_tokens
from mmmamba.data.sources.primer.splits import SPLITS, split_of

ABILITIES = ("read", "count", "relate", "absent", "text", *recall.SPANS)  # of validation and test
GROUPS = ("scene", "read", "text", *recall.SPANS)  # of training; scene = count, relate and absent

__all__ = [
    "ABILITIES",
    "GROUPS",
    "SPLITS",
    "CountTokens",
    "Example",
    "Meter",
    "Picture",
    "Turn",
    "corpus_texts",
    "estimate_tokens",
    "make",
    "split_of",
]

_MAKERS = {
    "scene": mixed.example,
    "read": read_lettering.example,
    "count": count.example,
    "relate": relate.example,
    "absent": absent.example,
    "text": text.example,
}


def make(seed: int, split: str, group: str, i: int, meter: Meter) -> Example:
    """Record ``i`` of ``group`` (one of `GROUPS` for training, of `ABILITIES` for the other splits)."""
    rng = Random(f"{seed}/{split}/{group}/{i}")
    if group in recall.SPANS:
        return recall.example(rng, split, group, meter)
    return _MAKERS[group](rng, split)
