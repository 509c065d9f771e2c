"""How many are there?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mmmamba.data.sources.primer.example import Example, Turn, about_picture
from mmmamba.data.sources.primer.scene import COLOURS, PLURALS, SHAPES, Scene, scene
from mmmamba.data.sources.primer.words import phrase

MOST = 6
NONE_SHARE = 0.04  # how often the answer is 0
CHANCE = (1 - NONE_SHARE) / MOST  # the other answers are equally likely
TEMPLATES = ("how many {things} are there?", "how many {things} can you see?", "count the {things}.")


def example(rng: Random, split: str) -> Example:
    picture, asked = plan(rng, split)
    return Example(
        ability="count",
        turns=about_picture([question(rng, picture, asked)]),
        pictures=(picture,),
        keys=(picture.key,),
        chance=CHANCE,
        facts={"asked": asked},
    )


def plan(rng: Random, split: str) -> tuple[Scene, str]:
    """A scene and what to count in it ("objects", a colour or a shape); the answer is drawn first, to be even."""
    target = 0 if rng.random() < NONE_SHARE else rng.randint(1, MOST)
    asked = rng.choice((*COLOURS, *SHAPES, *["objects"] * 6 * (target > 0)))

    def propose() -> list[str]:
        # Anew each time: one cross and nothing else may be a scene of another split in all its colours.
        others = 0 if asked == "objects" else rng.randint(1 if target == 0 else 0, MOST - target)
        # A few colours and shapes only, so that there is something to tell apart and something to count.
        colours = rng.sample(tuple(COLOURS), rng.randint(2, 4))
        shapes = rng.sample(SHAPES, rng.randint(2, 4))
        chosen = []
        for i in range(target + others):
            colour, shape = rng.choice(colours), rng.choice(shapes)
            if asked in COLOURS:
                colour = asked if i < target else _other(rng, tuple(COLOURS), asked)
            elif asked in SHAPES:
                shape = asked if i < target else _other(rng, SHAPES, asked)
            chosen.append(f"{colour} {shape}")
        return chosen

    return scene(rng, split, propose), asked


def question(rng: Random, picture: Scene, asked: str) -> Turn:
    if asked == "objects":
        things, count = "objects", len(picture.things)
    elif asked in COLOURS:
        things, count = f"{asked} objects", sum(thing.colour == asked for thing in picture.things)
    else:
        things, count = PLURALS[asked], sum(thing.shape == asked for thing in picture.things)
    return Turn(question=phrase(rng, TEMPLATES, things=things), answer=str(count))


def another(rng: Random, picture: Scene) -> Turn:
    """A further question about a scene that was made for something else."""
    if rng.random() < NONE_SHARE:
        return question(rng, picture, rng.choice((*COLOURS, *SHAPES)))
    there = {thing.colour for thing in picture.things} | {thing.shape for thing in picture.things}
    return question(rng, picture, rng.choice(("objects", *sorted(there))))


def _other(rng: Random, names: Sequence[str], unwanted: str) -> str:
    return rng.choice([name for name in names if name != unwanted])
