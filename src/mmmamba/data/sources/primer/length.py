"""How many tokens a record will take, chat marks and pictures included."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmmamba.data.sources.primer.example import IMAGE_MARK, Turn

PICTURE_TOKENS = 16 + 2  # a tile of 64 px, <img> and </img>
TURN_MARKS = 4  # <|im_start|> and <|im_end|>, of the question and of the answer

# A token for up to six small letters, each capital, digit, mark and line end, and a space before a capital or a digit.
PIECES = re.compile(r"[A-Z]?[a-z]{1,6}|[A-Z]|\d|[^\w\s]|\n| (?=[A-Z\d])|[^\x00-\x7f]")

CountTokens = Callable[[str], int]


def estimate_tokens(text: str) -> int:
    """A guess, mostly from above, for whoever has no tokenizer yet."""
    return len(PIECES.findall(text))


class Meter:
    """Counts the tokens of conversations about one-tile pictures, with bos and chat marks, without a system message."""

    def __init__(self, count_tokens: CountTokens = estimate_tokens) -> None:
        self._count = count_tokens
        self._known: dict[str, int] = {}

    def exact(self, turns: Sequence[Turn]) -> int:
        """What ``count_tokens`` says of every stretch of text between two marks."""
        return self._total(turns, self._count)

    def quick(self, turns: Sequence[Turn]) -> int:
        """The same, word by word from memory: exact where tokens don't reach from one word into the next."""
        return self._total(turns, self.words)

    def words(self, text: str) -> int:
        """Tokens of ``text`` as the sum over its words, each with the space before it."""
        total = 0
        for word in re.findall(r" ?\S+|\s", text):
            if word not in self._known:
                self._known[word] = self._count(word)
            total += self._known[word]
        return total

    def _total(self, turns: Sequence[Turn], count: CountTokens) -> int:
        total = 1  # bos
        for turn in turns:
            first, *rest = f"user\n{turn.question}".split(IMAGE_MARK)
            total += TURN_MARKS + count(first) + sum(PICTURE_TOKENS + count(text) for text in rest)
            total += count("assistant\n") + count(turn.answer)
        return total
