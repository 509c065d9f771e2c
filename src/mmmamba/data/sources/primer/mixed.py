"""Training conversations of several turns about one scene: describing, counting, relating, and what is absent."""

from __future__ import annotations

from random import Random

from mmmamba.data.sources.primer import absent, count, describe, relate
from mmmamba.data.sources.primer.example import Example, Turn, about_picture
from mmmamba.data.sources.primer.scene import Scene

MOST_TURNS = 5
DESCRIBED = 0.8  # share of the scenes that are also described


def example(rng: Random, split: str) -> Example:
    """A scene made for one of the abilities, asked about that one and then about any."""
    lead = rng.choice(("count", "relate", "absent"))
    turns: list[Turn] = []
    if lead == "count":
        picture, asked = count.plan(rng, split)
        turns.append(count.question(rng, picture, asked))
    else:
        picture = relate.plan(rng, split) if lead == "relate" else absent.plan(rng, split)
        _add(rng, picture, lead, turns)
    for _ in range(rng.randint(1, MOST_TURNS) - len(turns)):
        _add(rng, picture, rng.choice(("count", "relate", "relate", "absent")), turns)
    if not turns:  # two things side by side may be neither above one another nor of clearly different size
        turns.append(absent.question(rng, picture))
    if rng.random() < DESCRIBED:
        turns.append(describe.question(rng, picture))
    rng.shuffle(turns)
    return Example(ability="scene", turns=about_picture(turns), pictures=(picture,), keys=(picture.key,))


def _add(rng: Random, picture: Scene, ability: str, turns: list[Turn]) -> None:
    """One more turn, unless the scene has none of that ability or it would be asked twice."""
    turn: Turn | None
    if ability == "count":
        turn = count.another(rng, picture)
    elif ability == "absent":
        turn = absent.question(rng, picture)
    else:
        turn = relate.another(rng, picture)
    if turn is not None and all(turn.question.lower() != before.question.lower() for before in turns):
        turns.append(turn)
