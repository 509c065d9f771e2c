"""A picture of coloured shapes that don't touch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from mmmamba.data.sources.primer.lettering import TILE, Colour
from mmmamba.data.sources.primer.splits import draw, key_of

SHAPES = ("circle", "square", "triangle", "cross", "star")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLOURS: dict[str, Colour] = {
    "red": (220, 20, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 225),
    "yellow": (240, 205, 0),
    "orange": (250, 125, 10),
    "purple": (145, 40, 185),
    "cyan": (0, 200, 225),
    "black": (20, 20, 20),
}
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
GAP = 2  # pixels between the boxes of two objects
SMALL, MIDDLE, LARGE = (12, 14), (15, 18), (20, 25)  # sides in pixels; large is at least 1.4 times small
CLEAR = 10  # pixels between centres that make "left of" or "above" plain to see
LARGER = 1.4  # ratio of sides that makes "larger" plain to see


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object; ``left``, ``top``, ``size`` give its square box in pixels."""

    colour: str
    shape: str
    left: int
    top: int
    size: int
    fill: Colour

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.size / 2, self.top + self.size / 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects on a light background."""

    things: tuple[Thing, ...]
    paper: Colour

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(thing.kind for thing in self.things))

    @property
    def key(self) -> str:
        """What is held out: which kinds are together, wherever they are."""
        return key_of("scene", self.kinds)

    def unique(self) -> list[Thing]:
        """The objects that "the red circle" names without doubt."""
        return [thing for thing in self.things if self.kinds.count(thing.kind) == 1]

    def render(self) -> Image.Image:
        image = Image.new("RGB", (TILE, TILE), self.paper)
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw(pen, thing)
        return image


def scene(rng: Random, split: str, propose: Callable[[], Sequence[str]], contrast: bool = False) -> Scene:
    """A scene of the proposed kinds, proposed again until their combination belongs to ``split``.

    Args:
        contrast: draw only small and large objects, so that "which is larger" has an answer more often.
    """
    kinds = list(draw(split, lambda: tuple(sorted(propose())), "scene"))
    rng.shuffle(kinds)
    return Scene(things=_place(rng, kinds, contrast), paper=_paper(rng))


def big_shape(rng: Random, kind: str) -> Scene:
    """One object that fills most of the tile."""
    size = rng.randint(30, 48)
    left, top = rng.randint(2, TILE - 2 - size), rng.randint(2, TILE - 2 - size)
    return Scene(things=(_thing(rng, kind, left, top, size),), paper=_paper(rng))


def _place(rng: Random, kinds: Sequence[str], contrast: bool) -> tuple[Thing, ...]:
    """Sizes and places, the largest first; starts over in the rare case that one finds no room."""
    while True:
        boxes: list[tuple[int, int, int]] = []
        for size in sorted(_sizes(rng, len(kinds), contrast), reverse=True):
            for _ in range(40):
                left, top = rng.randint(1, TILE - 1 - size), rng.randint(1, TILE - 1 - size)
                if all(_apart(left, top, size, *box) for box in boxes):
                    boxes.append((left, top, size))
                    break
        if len(boxes) == len(kinds):
            rng.shuffle(boxes)
            return tuple(_thing(rng, kind, *box) for kind, box in zip(kinds, boxes, strict=True))


def _sizes(rng: Random, count: int, contrast: bool) -> list[int]:
    room_for_large = 1 if count > 4 else 2 if count > 3 else count
    sizes: list[int] = []
    for i in range(count):
        ranges = [SMALL] if contrast else [SMALL, MIDDLE]
        if i < room_for_large:
            ranges.append(LARGE)
        sizes.append(rng.randint(*rng.choice(ranges)))
    return sizes


def _apart(left: int, top: int, size: int, other_left: int, other_top: int, other_size: int) -> bool:
    return (
        left >= other_left + other_size + GAP
        or other_left >= left + size + GAP
        or top >= other_top + other_size + GAP
        or other_top >= top + size + GAP
    )


def _thing(rng: Random, kind: str, left: int, top: int, size: int) -> Thing:
    colour, shape = kind.split()
    red, green, blue = (min(255, max(0, level + rng.randint(-12, 12))) for level in COLOURS[colour])
    return Thing(colour=colour, shape=shape, left=left, top=top, size=size, fill=(red, green, blue))


def _paper(rng: Random) -> Colour:
    """Light, so that every colour of an object stands out."""
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top, size, fill = thing.left, thing.top, thing.size, thing.fill
    right, bottom = left + size - 1, top + size - 1
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=fill)
    elif thing.shape == "cross":
        arm = round(size / 3)
        inset = (size - arm) // 2
        pen.rectangle((left + inset, top, right - inset, bottom), fill=fill)
        pen.rectangle((left, top + inset, right, bottom - inset), fill=fill)
    else:
        x, y = (left + right) / 2, (top + bottom) / 2
        points = []
        for i in range(10):
            radius = (size - 1) / 2 * (1 if i % 2 == 0 else 0.45)
            angle = math.pi * (i / 5 - 0.5)
            points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        pen.polygon(points, fill=fill)
