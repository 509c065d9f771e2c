"""What is in the picture, in order? For training only: the answer names every thing, so much is learnt at once."""

from __future__ import annotations

from random import Random

from mmmamba.data.sources.primer.example import Turn
from mmmamba.data.sources.primer.scene import Scene
from mmmamba.data.sources.primer.words import phrase

ORDERS = {
    0: ("list the objects from left to right.", "what is there, from left to right?"),
    1: ("list the objects from top to bottom.", "what is there, from top to bottom?"),
}


def question(rng: Random, picture: Scene) -> Turn:
    """Every thing of the scene, by the place of its centre along one axis."""
    axis = rng.choice(tuple(ORDERS))
    things = sorted(picture.things, key=lambda thing: thing.centre[axis])
    return Turn(question=phrase(rng, ORDERS[axis]), answer=", ".join(thing.kind for thing in things))
