"""A picture of a word or a number."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

TILE = 64  # pixels: height of every picture, and the unit of its width
EMBEDDED = "embedded"  # Pillow's own font
FONTS = (EMBEDDED, "DejaVuSans-Bold", "DejaVuSansMono-Bold")
NARROW = "DejaVuSansMono-Bold"  # fits 5 capitals of the smallest size on a tile, whatever they are
SMALLEST = 18  # font size with capitals of 12 to 13 px
LARGEST = 44
MARGIN = 2
CONTRAST = 128  # smallest difference of luminance, of 255

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Lettering:
    """Text on a plain background; ``left``, ``top`` is where its ink begins."""

    text: str
    width: int
    font: str
    size: int
    left: int
    top: int
    ink: Colour
    paper: Colour

    def render(self) -> Image.Image:
        image = Image.new("RGB", (self.width, TILE), self.paper)
        font = load_font(self.font, self.size)
        x, y, _, _ = font.getbbox(self.text)
        ImageDraw.Draw(image).text((self.left - x, self.top - y), self.text, font=font, fill=self.ink)
        return image


def lettering(rng: Random, text: str, width: int = TILE, smallest: int = SMALLEST) -> Lettering:
    """``text`` in a random font, size, place and pair of colours that keep it legible and whole."""
    font = rng.choice(FONTS)
    if _ink(font, smallest, text)[0] > width - 2 * MARGIN:
        font = NARROW
    # Widths grow with the size nearly linearly; the loop takes back what rounding added.
    room = width - 2 * MARGIN
    limit = min(LARGEST, max(smallest, smallest * room // max(1, _ink(font, smallest, text)[0])))
    size = rng.randint(smallest, limit)
    while (ink := _ink(font, size, text))[0] > room and size > 1:
        size -= 1
    paper, colour = _colours(rng)
    return Lettering(
        text=text,
        width=width,
        font=font,
        size=size,
        left=rng.randint(MARGIN, max(MARGIN, width - MARGIN - ink[0])),
        top=rng.randint(MARGIN, max(MARGIN, TILE - MARGIN - ink[1])),
        ink=colour,
        paper=paper,
    )


@functools.cache
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that every installation has: Pillow's own, or one of those that come with matplotlib."""
    if name == EMBEDDED:
        font = ImageFont.load_default(size=size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("this Pillow was built without FreeType, which its scalable default font needs")
        return font
    return ImageFont.truetype(_font_folder() / f"{name}.ttf", size)


@functools.cache
def _font_folder() -> Path:
    import matplotlib  # slow to import, and needed for this one path

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _ink(font: str, size: int, text: str) -> tuple[int, int]:
    """(width, height) of the inked box, in pixels."""
    left, top, right, bottom = load_font(font, size).getbbox(text)
    return int(right - left), int(bottom - top)


def _colours(rng: Random) -> tuple[Colour, Colour]:
    while True:
        paper, ink = _random_colour(rng), _random_colour(rng)
        if abs(luminance(paper) - luminance(ink)) >= CONTRAST:
            return paper, ink


def _random_colour(rng: Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
