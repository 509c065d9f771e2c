"""How every plot looks, and how it becomes a file. Matplotlib is used without pyplot: no global state, no display."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, Literal

from mmmamba.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind readers and read on white and on near-black.
PALETTE = ("#3b82c4", "#e0862f", "#2f9e77", "#c65a9e", "#8a6fd1", "#b59a1c", "#4fb3d1", "#d1574b")
Theme = Literal["light", "dark"]
LABEL, TITLE = 60, 120  # characters of a name in a figure, and of its heading
THEMES: tuple[Theme, Theme] = ("light", "dark")
INK = {"light": "#1f2933", "dark": "#e4e9ee"}
GRID = {"light": "#d9dee4", "dark": "#3a444f"}

# Letters are stored as text. As outlines they would be most of the file, and could be neither searched nor read aloud.
# The layout uses the first font, which comes with matplotlib. Readers without it see the second, which is as wide.
_ABOUT = ("Creator", "Date", "Format", "Type")  # facts that matplotlib writes into a file, left out
_SVG: dict[Any, Any] = {
    "svg.hashsalt": "mmmamba",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
}


def new_figure(width: float, height: float, theme: Theme = "light") -> Figure:
    """An empty figure of ``width`` × ``height`` inches: white, or see-through for a dark page."""
    from matplotlib.figure import Figure  # here: matplotlib takes half a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor("white" if theme == "light" else "none")
    return figure


def style(axis: Axes, theme: Theme = "light") -> None:
    """Give an axis the common look: horizontal grid lines in the background, one spine, no ticks."""
    axis.set_facecolor("none")
    axis.grid(axis="y", color=GRID[theme], linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID[theme])
    axis.tick_params(which="both", length=0, colors=INK[theme], labelsize=9)
    for text in (axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label):  # type: ignore[attr-defined]
        text.set_color(INK[theme])


def label(name: str, longest: int = LABEL) -> str:
    """A name as a plot shows it: unchanged, on one line, not too long.

    To matplotlib, dollars enclose mathematics, and a label that begins with an underscore is not for the legend.
    """
    shown = printable(name, longest).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def render(figure: Figure, format: Literal["png", "svg"]) -> bytes:
    """The figure's file content; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    from matplotlib import rc_context

    with rc_context(_SVG), warnings.catch_warnings():
        # A letter that no font has becomes a box, and very long names overlap. The tables show them in full.
        warnings.filterwarnings("ignore", "Glyph .* missing from font|constrained_layout not applied")
        figure.savefig(buffer, format=format, dpi=160, metadata=dict.fromkeys(_ABOUT) if format == "svg" else None)
    return buffer.getvalue()
