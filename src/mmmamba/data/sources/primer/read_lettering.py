"""What is written?"""

from __future__ import annotations

from random import Random

from mmmamba.data.sources.primer.example import Example, Turn, about_picture
from mmmamba.data.sources.primer.lettering import TILE, lettering
from mmmamba.data.sources.primer.splits import key_of
from mmmamba.data.sources.primer.words import number, phrase, word

CHANCE = 0.02  # the commonest number of a split: one-digit numbers are few
WIDE_SHARE = 0.4
SMALLEST_WIDE = 22  # font size
ANY = ("read the text.", "what is written?")
TEMPLATES = {"word": ("what word is written?", *ANY), "number": ("what number is written?", *ANY)}
LETTER = {"word": "what is the {place} letter?", "number": "what is the {place} digit?"}


def example(rng: Random, split: str) -> Example:
    wide = rng.random() < WIDE_SHARE
    kind = "number" if rng.random() < (0.2 if wide else 0.4) else "word"
    if wide:
        width = TILE * rng.choice((2, 3, 4))
        text = word(rng, split, (4, 5, 6, 7)) if kind == "word" else number(rng, split, (4, 5))
        picture = lettering(rng, text, width, SMALLEST_WIDE)
    else:
        # Few short ones: there are but 10 numbers of one digit and 90 of two, a tenth of them in a test.
        text = word(rng, split, (2, 3, 3, 4, 4)) if kind == "word" else number(rng, split, _DIGITS)
        picture = lettering(rng, text)
    turns = [Turn(question=phrase(rng, TEMPLATES[kind]), answer=text)]
    if split == "train" and rng.random() < 0.25:
        # Before the whole is read out: afterwards it could be answered without looking.
        place, letter = rng.choice((("first", text[0]), ("last", text[-1])))
        turns.insert(0, Turn(question=phrase(rng, (LETTER[kind],), place=place), answer=letter))
    return Example(
        ability="read",
        turns=about_picture(turns),
        pictures=(picture,),
        keys=(key_of(kind, (text,)),),
        chance=CHANCE,
    )


_DIGITS = (1,) + (2,) * 4 + (3,) * 8 + (4,) * 8
