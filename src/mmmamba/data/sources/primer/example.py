"""What a generator hands back, before any picture is drawn or any file written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

IMAGE_MARK = "<image>"


class Picture(Protocol):
    """A description of a picture: small, comparable, and drawn only when somebody wants the pixels."""

    def render(self) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record to be.

    Attributes:
        ability: what it asks for; in training files also "scene" (count, relate and absent about one picture).
        turns: the conversation; the first question holds the ``<image>`` marks.
        pictures: what the marks stand for, in order.
        keys: the held-out things it uses ("word:BAKO", "scene:…"); each belongs to this example's split alone.
        chance: how often the best guess that looks at no picture (text: at no fact) is right, for the first
            question; only tests carry it into the file.
        facts: what the answer was made from, for tests that work it out again; never written to a file.
    """

    ability: str
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    keys: tuple[str, ...] = ()
    chance: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def about_picture(turns: list[Turn]) -> tuple[Turn, ...]:
    """The turns, with the one picture shown before the first question."""
    first = Turn(question=f"{IMAGE_MARK}\n{turns[0].question}", answer=turns[0].answer)
    return (first, *turns[1:])
