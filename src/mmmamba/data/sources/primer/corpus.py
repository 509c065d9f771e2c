"""Text to train a tokenizer from: what the built-in sources say, without the words to be read, and some more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from mmmamba.data.sources.primer import absent, count, filler, read_lettering, recall, relate
from mmmamba.data.sources.primer import text as tasks
from mmmamba.data.sources.primer.example import IMAGE_MARK, Example
from mmmamba.data.sources.primer.length import Meter

# What easy-VQA asks, so that its package isn't needed to train the same tokenizer.
EASY_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY = (
    "does the image contain a {thing}?",
    "does the image not contain a {thing}?",
    "is a {thing} present?",
    "is no {thing} present?",
    "is there a {thing} in the image?",
    "is there not a {thing}?",
    "what color is the {shape}?",
    "what is the color of the {shape}?",
    "what is the color of the shape?",
    "what is the {colour} shape?",
    "what shape does the image contain?",
    "what shape is in the image?",
    "what shape is present?",
)
ROLES = ("user\n", "assistant\n", "system\n", "You are a helpful assistant.")
GENERAL = (
    "The quick brown fox jumps over the lazy dog.",
    "Please describe what you see in the picture, in one short sentence.",
    "There is no doubt about it: this is one of the best answers that we have found.",
    "Yes, we can see that. It was not there before, was it?",
    "You can write to me at any time; they will be here (most of the time).",
    'She said: "nothing is as simple as it looks" - and then she left.',
    "for x in range(10): print(x * 2, x + 1)  # a comment",
    "The price of $9.99 is 10% less than before & [that] is fine/good = true.",
    "How does it work? First, look at the image. Then, think about what is asked.",
    "People from all over the world have been working on these questions for many years.",
)
WORLD = (
    "图片里有什么？",
    "请用中文回答这个问题。",
    "今天天气很好。",
    "🙂🚀🎉",
    "café, naïve, Übung, señor",
    "привет, мир",
)
TO_READ = re.compile(r" ?\b[A-Z]+\b")
BEFORE_CAPITAL = re.compile(r" (?=[A-Z])")


def corpus_texts(seed: int = 0, n: int = 6000) -> Iterator[str]:
    """``n`` texts for :func:`mmmamba.data.bpe_training.train_bpe`: questions, answers, filler, roles and general lines.

    They hold no word in capitals and no space before a capital, so that nothing merges with the letters of the words
    that a model must spell. Only training records are drawn from.
    """
    rng = Random(f"corpus {seed}")
    for i in range(n):
        text = TO_READ.sub("", _text(rng, i)).replace(IMAGE_MARK, "")
        yield BEFORE_CAPITAL.sub("\n", text)


def _text(rng: Random, i: int) -> str:
    part = i % 10
    if part < 5:
        example = _example(rng, i // 10 * 5 + part)
        return "\n".join(line for turn in example.turns for line in (turn.question, turn.answer))
    if part < 7:
        return _easy(rng)
    if part == 7:
        return filler.sentence(rng)
    if part == 8:
        return rng.choice(ROLES)
    return rng.choice(WORLD if rng.random() < 0.05 else GENERAL)


def _example(rng: Random, i: int) -> Example:
    makers = (read_lettering.example, count.example, relate.example, absent.example, tasks.example)
    kind = i % (len(makers) + 1)
    return makers[kind](rng, "train") if kind < len(makers) else recall.example(rng, "train", "recall-1x", Meter())


def _easy(rng: Random) -> str:
    colour, shape = rng.choice(EASY_COLOURS), rng.choice(EASY_SHAPES)
    thing = rng.choice((f"{colour} shape", shape))
    return rng.choice(EASY).format(thing=thing, colour=colour, shape=shape)
