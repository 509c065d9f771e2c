"""Where is one thing from another, and which is larger?"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mmmamba.data.sources.primer.example import Example, Turn, about_picture
from mmmamba.data.sources.primer.scene import CLEAR, KINDS, LARGER, Scene, Thing, scene
from mmmamba.data.sources.primer.words import phrase

CHANCE = {"is": 0.5, "which": 0.5, "what": round(1 / (len(KINDS) - 1), 4)}
WAYS = ("left", "right", "above", "below")
OPPOSITE = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "larger": "smaller",
    "smaller": "larger",
}
IS = {
    "left": ("is the {a} left of the {b}?", "is the {a} to the left of the {b}?"),
    "right": ("is the {a} right of the {b}?", "is the {a} to the right of the {b}?"),
    "above": ("is the {a} above the {b}?", "is the {a} higher than the {b}?"),
    "below": ("is the {a} below the {b}?", "is the {a} lower than the {b}?"),
    "larger": ("is the {a} larger than the {b}?", "is the {a} bigger than the {b}?"),
    "smaller": ("is the {a} smaller than the {b}?",),
}
WHICH = {
    "larger": ("which is larger, the {a} or the {b}?", "which is bigger, the {a} or the {b}?"),
    "smaller": ("which is smaller, the {a} or the {b}?",),
}
WHAT = {
    "left": ("what is left of the {b}?", "what is to the left of the {b}?"),
    "right": ("what is right of the {b}?", "what is to the right of the {b}?"),
    "above": ("what is above the {b}?",),
    "below": ("what is below the {b}?",),
}


def example(rng: Random, split: str) -> Example:
    form = rng.choices(("is", "which", "what"), (0.6, 0.2, 0.2))[0]
    while True:  # a few scenes have no clear pair of the form asked for
        picture = plan(rng, split)
        turn = FORMS[form](rng, picture)
        if turn is not None:
            return Example(
                ability="relate",
                turns=about_picture([turn]),
                pictures=(picture,),
                keys=(picture.key,),
                chance=CHANCE[form],
                facts={"form": form},
            )


def plan(rng: Random, split: str) -> Scene:
    count = rng.choices((2, 3, 4, 5, 6), (35, 30, 20, 10, 5))[0]
    return scene(rng, split, lambda: rng.sample(KINDS, count), contrast=True)


def another(rng: Random, picture: Scene) -> Turn | None:
    """A question about a scene that may have been made for something else; None when nothing is clear in it."""
    return FORMS[rng.choices(("is", "which", "what"), (0.6, 0.2, 0.2))[0]](rng, picture)


def stands(a: Thing, way: str, b: Thing) -> bool:
    """Whether a is plainly left of (right of, above, below, larger than, smaller than) b."""
    if way == "larger":
        return a.size >= LARGER * b.size
    if way == "left":
        return b.centre[0] - a.centre[0] >= CLEAR
    if way == "above":
        return b.centre[1] - a.centre[1] >= CLEAR
    return stands(b, OPPOSITE[way], a)


def _ask_is(rng: Random, picture: Scene) -> Turn | None:
    # First left/right, above/below or larger/smaller, then a pair: all three are asked for equally often.
    way = rng.choice(tuple(IS))
    pair = _pair(rng, picture, way)
    if pair is None:
        return None
    a, b = pair
    if rng.random() < 0.5:
        return Turn(question=phrase(rng, IS[way], a=a.kind, b=b.kind), answer="yes")
    return Turn(question=phrase(rng, IS[way], a=b.kind, b=a.kind), answer="no")


def _ask_which(rng: Random, picture: Scene) -> Turn | None:
    way = rng.choice(tuple(WHICH))
    pair = _pair(rng, picture, way)
    if pair is None:
        return None
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return Turn(question=phrase(rng, WHICH[way], a=a.kind, b=b.kind), answer=pair[0].kind)


def _ask_what(rng: Random, picture: Scene) -> Turn | None:
    """Only where exactly one thing is there, and every other one is plainly on the other side."""
    clear = [
        (way, b, answers[0])
        for way in WAYS
        for b in picture.unique()
        if len(answers := [a for a in picture.things if stands(a, way, b)]) == 1
        and all(stands(b, way, other) for other in picture.things if other not in (b, answers[0]))
    ]
    if not clear:
        return None
    way, b, answer = rng.choice(clear)
    return Turn(question=phrase(rng, WHAT[way], b=b.kind), answer=answer.kind)


def _pair(rng: Random, picture: Scene, way: str) -> tuple[Thing, Thing] | None:
    """(a, b) with a plainly ``way`` of b, each the only one of its kind."""
    unique = picture.unique()
    pairs = [(a, b) for a in unique for b in unique if stands(a, way, b)]
    return rng.choice(pairs) if pairs else None


FORMS: dict[str, Callable[[Random, Scene], Turn | None]] = {"is": _ask_is, "which": _ask_which, "what": _ask_what}
