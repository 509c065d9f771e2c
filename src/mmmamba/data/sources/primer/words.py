"""Made-up words, numbers, and small helpers of phrasing."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mmmamba.data.sources.primer.splits import draw

VOWELS = "AEIOU"
CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def word(rng: Random, split: str, lengths: Sequence[int]) -> str:
    """A pronounceable word in capitals, of one of the ``lengths``, that belongs to ``split``."""

    def propose() -> tuple[str, ...]:
        consonant = rng.random() < 0.75
        letters = ""
        for _ in range(rng.choice(lengths)):
            # A letter out of turn now and then, so that no reader learns to guess every second one among five.
            odd = rng.random() < 0.15
            choices = LETTERS if odd else CONSONANTS if consonant else VOWELS
            letter = rng.choice(choices)
            while letters.endswith(letter):  # "LLL" and "III" are hard to count, for anyone
                letter = rng.choice(choices)
            letters += letter
            consonant = not consonant
        return (letters,)

    return draw(split, propose, "word")[0]


def number(rng: Random, split: str, lengths: Sequence[int]) -> str:
    """A number without leading zeros, with one of the ``lengths`` of digits, that belongs to ``split``."""

    def propose() -> tuple[str, ...]:
        digits = rng.choice(lengths)
        return (str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)),)

    return draw(split, propose, "number")[0]


def a(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrase(rng: Random, templates: Sequence[str], **fields: str) -> str:
    """One of the paraphrases, filled in; half of them begin with a capital, as people write and as they don't."""
    text = rng.choice(templates).format(**fields)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
