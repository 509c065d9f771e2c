"""Remember one thing out of many, over one, four and sixteen times the length that distillation sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mmmamba.data.sources.primer import filler
from mmmamba.data.sources.primer.example import IMAGE_MARK, Example, Picture, Turn
from mmmamba.data.sources.primer.length import Meter
from mmmamba.data.sources.primer.lettering import lettering
from mmmamba.data.sources.primer.scene import COLOURS, KINDS, SHAPES, big_shape
from mmmamba.data.sources.primer.splits import draw, key_of
from mmmamba.data.sources.primer.words import number, phrase, word


@dataclass(frozen=True, kw_only=True)
class Span:
    """A length: tokens of the whole sequence, and how many pictures or facts are in it (each from, to)."""

    tokens: tuple[int, int]
    pictures: tuple[int, int]
    facts: tuple[int, int]
    most_turns: int  # in training


SPANS = {
    "recall-1x": Span(tokens=(120, 192), pictures=(3, 6), facts=(3, 5), most_turns=4),
    "recall-4x": Span(tokens=(500, 768), pictures=(5, 10), facts=(6, 10), most_turns=8),
    "recall-16x": Span(tokens=(2000, 3072), pictures=(8, 16), facts=(10, 20), most_turns=16),
}

ABOUT = {  # paraphrases of each question about a picture of that kind
    "shape": (
        ("what colour is the shape in image {i}?", "what is the colour of the shape in image {i}?"),
        ("what shape is in image {i}?", "which shape is in image {i}?"),
    ),
    "number": (("what number is in image {i}?", "what number is written in image {i}?"),),
    "word": (("what word is in image {i}?", "what word is written in image {i}?"),),
}
FACT = "the code of {key} is {code}."
ABOUT_FACT = ("what is the code of {key}?", "which code does {key} have?", "tell me the code of {key}.")
LONGEST_FILLER = 40  # tokens; one sentence takes fewer in any tokenizer that has a token a letter or better


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to remember: its line in the text, and the questions (each with its answer) about it."""

    kind: str  # "word" (of a picture, or the key of a fact), "number" or "shape"
    text: str
    line: str
    questions: tuple[Turn, ...]
    code: str = ""  # of a fact
    picture: Picture | None = None


def example(rng: Random, split: str, ability: str, meter: Meter) -> Example:
    span = SPANS[ability]
    while True:
        items = _pictures(rng, split, span) if rng.random() < 0.5 else _facts(rng, split, span)
        wanted = rng.randint(1, span.most_turns) if split == "train" else 1
        asked = [(item, rng.choice(item.questions)) for item in rng.sample(items, min(wanted, len(items)))]
        turns = _fill(rng, items, [turn for _, turn in asked], span, meter)
        if turns is not None:  # else too long even without filler: draw again
            return Example(
                ability=ability,
                turns=turns,
                pictures=tuple(item.picture for item in items if item.picture is not None),
                keys=_keys(items),
                chance=round(_chance(items, *asked[0]), 4),
                facts={"items": items},
            )


def _keys(items: Sequence[Item]) -> tuple[str, ...]:
    """Words and numbers each by themselves; the shapes as a row, for each kind of shape alone is in every split."""
    row = tuple(item.text for item in items if item.kind == "shape")
    numbers = tuple(key_of("number", (item.code,)) for item in items if item.code)
    rest = tuple(key_of(item.kind, (item.text,)) for item in items if item.kind != "shape")
    return (*rest, *numbers, *([key_of("row", row)] if row else []))


def _chance(items: Sequence[Item], asked: Item, turn: Turn) -> float:
    """The better of a blind guess and one of the items at random."""
    blind = 0.0 if asked.kind != "shape" else 1 / len(SHAPES if turn.answer in SHAPES else COLOURS)
    return max(blind, 1 / len(items))


def _fill(
    rng: Random, items: Sequence[Item], asked: Sequence[Turn], span: Span, meter: Meter
) -> tuple[Turn, ...] | None:
    """The conversation, with filler between the items until its length is a random one within the span.

    None when it is too long without any.
    """
    shortest, longest = span.tokens

    def conversation(sentences: Sequence[str], places: Sequence[int]) -> tuple[Turn, ...]:
        gaps: list[list[str]] = [[] for _ in range(len(items) + 1)]
        for sentence, place in zip(sentences, places, strict=True):
            gaps[place].append(sentence)
        text = _join(items, gaps)
        return (Turn(question=f"{text}\n{asked[0].question}", answer=asked[0].answer), *asked[1:])

    length = meter.quick(conversation([], []))
    if length > longest:
        return None
    target = rng.randint(min(max(length, shortest + LONGEST_FILLER), longest), longest)
    sentences: list[str] = []
    while (length := length + meter.words(f" {(sentence := filler.sentence(rng))}")) <= target:
        sentences.append(sentence)
    places = [rng.randint(0, len(items)) for _ in sentences]
    while not shortest <= (length := meter.exact(turns := conversation(sentences, places))) <= longest:
        # Only where words cost more or less together than apart.
        if length > longest:
            if not sentences:
                return None
            sentences.pop()
            places.pop()
        else:
            sentences.append(filler.sentence(rng))
            places.append(rng.randint(0, len(items)))
    return turns


def _join(items: Sequence[Item], gaps: Sequence[Sequence[str]]) -> str:
    """Pictures and their labels each on a line of their own; facts run on in the text."""
    if items[0].picture is None:
        parts = [*gaps[0]]
        for item, gap in zip(items, gaps[1:], strict=True):
            parts += [item.line, *gap]
        return " ".join(parts)
    lines = [" ".join(gaps[0])]
    for item, gap in zip(items, gaps[1:], strict=True):
        lines += [item.line, " ".join(gap)]
    return "\n".join(line for line in lines if line)


def _facts(rng: Random, split: str, span: Span) -> list[Item]:
    """Codes of distinct keys that already differ in their first two letters."""
    count = rng.randint(*span.facts)
    codes: dict[str, str] = {}
    beginnings: set[str] = set()
    while len(codes) < count:
        key = word(rng, split, (4,))
        if key[:2] in beginnings:
            continue
        beginnings.add(key[:2])
        code = number(rng, split, (2, 3))
        while code in codes.values():
            code = number(rng, split, (2, 3))
        codes[key] = code
    return [
        Item(
            kind="word",
            text=key,
            line=FACT.format(key=key, code=code),
            questions=(Turn(question=phrase(rng, ABOUT_FACT, key=key), answer=code),),
            code=code,
        )
        for key, code in codes.items()
    ]


def _pictures(rng: Random, split: str, span: Span) -> list[Item]:
    """Each one big shape, a number or a word."""
    kinds = [rng.choice(("shape", "shape", "number", "word")) for _ in range(rng.randint(*span.pictures))]

    def propose() -> tuple[str, ...]:
        return tuple(rng.choice(KINDS) for kind in kinds if kind == "shape")

    row = iter(draw(split, propose, "row") if "shape" in kinds else ())
    items = []
    for i, kind in enumerate(kinds, start=1):
        if kind == "shape":
            text = next(row)
        else:
            text = word(rng, split, (2, 3, 4)) if kind == "word" else number(rng, split, (2, 3))
        items.append(_picture(rng, i, kind, text))
    return items


def _picture(rng: Random, i: int, kind: str, text: str) -> Item:
    answers = {"shape": text.split()}.get(kind, [text])
    return Item(
        kind=kind,
        text=text,
        line=f"Image-{i}: {IMAGE_MARK}",
        questions=tuple(
            Turn(question=phrase(rng, templates, i=str(i)), answer=answer)
            for templates, answer in zip(ABOUT[kind], answers, strict=True)
        ),
        picture=big_shape(rng, text) if kind == "shape" else lettering(rng, text),
    )
