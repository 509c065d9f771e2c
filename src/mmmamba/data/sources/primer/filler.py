"""Sentences that say nothing a question asks for."""

from __future__ import annotations

from random import Random

WHO = ("a man", "a woman", "the old farmer", "my friend", "the baker", "a child", "the teacher", "our guest")
DOES = (
    "walks to",
    "looks at",
    "comes back from",
    "waits near",
    "talks about",
    "thinks of",
    "works in",
    "goes past",
)
PLACE = ("the garden", "the market", "the river", "the school", "the hill", "the small town", "the mill", "the bridge")
WHEN = (
    "in the morning",
    "every day",
    "after lunch",
    "at night",
    "in summer",
    "with a smile",
    "without a word",
    "again",
)
WEATHER = ("it rains", "the wind blows", "the sun shines", "the snow falls", "the sky is clear", "it is warm")
JOIN = ("and", "but", "while", "so")


def sentence(rng: Random) -> str:
    """One sentence, in lower case, of about 6 to 14 words."""
    plain = f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(PLACE)}"
    roll = rng.random()
    if roll < 0.4:
        return f"{plain} {rng.choice(WHEN)}."
    if roll < 0.7:
        return f"{rng.choice(WEATHER)} {rng.choice(JOIN)} {plain}."
    return f"{plain}."
