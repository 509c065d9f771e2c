"""Is it there? Half of what is asked for isn't, and most of that nearly is."""

from __future__ import annotations

from random import Random

from mmmamba.data.sources.primer.example import Example, Turn, about_picture
from mmmamba.data.sources.primer.scene import COLOURS, KINDS, SHAPES, Scene, scene
from mmmamba.data.sources.primer.words import a, phrase

CHANCE = 0.5
TEMPLATES = ("is there {thing}?", "is there {thing} in the picture?", "can you see {thing}?")


def example(rng: Random, split: str) -> Example:
    picture = plan(rng, split)
    turn = question(rng, picture)
    return Example(
        ability="absent", turns=about_picture([turn]), pictures=(picture,), keys=(picture.key,), chance=CHANCE
    )


def plan(rng: Random, split: str) -> Scene:
    count = rng.randint(1, 5)
    return scene(rng, split, lambda: rng.choices(KINDS, k=count))


def question(rng: Random, picture: Scene) -> Turn:
    there = rng.random() < 0.5
    kind = rng.choice(picture.kinds) if there else _missing(rng, picture)
    return Turn(question=phrase(rng, TEMPLATES, thing=a(kind)), answer="yes" if there else "no")


def _missing(rng: Random, picture: Scene) -> str:
    """A kind that isn't there: mostly one whose colour or shape, or each of them apart, is."""
    colours = {thing.colour for thing in picture.things}
    shapes = {thing.shape for thing in picture.things}
    both = [f"{c} {s}" for c in sorted(colours) for s in sorted(shapes) if f"{c} {s}" not in picture.kinds]
    near = [f"{c} {s}" for c in sorted(colours) for s in SHAPES if s not in shapes]
    near += [f"{c} {s}" for c in COLOURS if c not in colours for s in sorted(shapes)]
    roll = rng.random()
    if both and roll < 0.35:
        return rng.choice(both)
    if near and roll < 0.85:
        return rng.choice(near)
    return rng.choice([kind for kind in KINDS if kind not in picture.kinds])
