"""Tasks without a picture: look up, reverse, add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from mmmamba.data.sources.primer.example import Example, Turn
from mmmamba.data.sources.primer.scene import COLOURS
from mmmamba.data.sources.primer.splits import draw, key_of
from mmmamba.data.sources.primer.words import LETTERS, phrase

LARGEST_TERM = 49
TABLE_WORDS = (*COLOURS, "cat", "dog", "bird", "fish", "apple", "tree", "house", "boat")
LOOKUP = ("what is {word}?", "which number is {word}?")
REVERSE = ("reverse: {sequence}", "write backwards: {sequence}")
SUM = ("{a} + {b}", "what is {a} + {b}?", "{a} + {b} = ?")
SUM_CHANCE = 0.02  # 50 of the 2,500 pairs have the commonest sum


def example(rng: Random, split: str) -> Example:
    """One task; in training up to three, one after the other."""
    tasks = [_task(rng, split) for _ in range(rng.randint(1, 4) if split == "train" else 1)]
    return replace(
        tasks[0],
        turns=tuple(turn for task in tasks for turn in task.turns),
        keys=tuple(key for task in tasks for key in task.keys),
    )


def lookup(rng: Random, split: str) -> Example:
    def propose() -> tuple[str, ...]:
        words = rng.sample(TABLE_WORDS, rng.randint(3, 5))
        digits = rng.sample(range(10), len(words))
        return tuple(sorted(f"{word} {digit}" for word, digit in zip(words, digits, strict=True)))

    table = draw(split, propose, "table")
    word, digit = rng.choice(table).split()
    shown = rng.sample(table, len(table))
    question = phrase(rng, LOOKUP, word=word)
    return _example(f"{', '.join(shown)}. {question}", digit, key_of("table", table), 1 / len(table))


def reverse(rng: Random, split: str) -> Example:
    def propose() -> tuple[str, ...]:
        sequence = rng.choices(LETTERS if rng.random() < 0.6 else "0123456789", k=rng.choice((3, 4, 5, 6)))
        # One key for both directions: else a test could ask back what training had asked.
        return tuple(min(sequence, sequence[::-1]))

    sequence = list(draw(split, propose, "sequence"))
    key = key_of("sequence", tuple(sequence))
    if rng.random() < 0.5:
        sequence.reverse()
    question = phrase(rng, REVERSE, sequence=" ".join(sequence))
    return _example(question, " ".join(reversed(sequence)), key, 0.0)


def add(rng: Random, split: str) -> Example:
    def propose() -> tuple[str, ...]:
        # One key for a + b and b + a.
        return tuple(map(str, sorted((rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)))))

    pair = draw(split, propose, "sum")
    a, b = rng.sample(pair, 2)
    return _example(phrase(rng, SUM, a=a, b=b), str(int(a) + int(b)), key_of("sum", pair), SUM_CHANCE)


def _task(rng: Random, split: str) -> Example:
    tasks: tuple[Callable[[Random, str], Example], ...] = (lookup, reverse, add)
    return rng.choices(tasks, (0.4, 0.35, 0.25))[0](rng, split)


def _example(question: str, answer: str, key: str, chance: float) -> Example:
    turn = Turn(question=question, answer=answer)
    return Example(ability="text", turns=(turn,), keys=(key,), chance=round(chance, 4))
