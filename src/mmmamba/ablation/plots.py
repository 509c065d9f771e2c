"""The plot of a table: what each cell keeps of the teacher, with its interval over seeds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmmamba.ablation.plan import MEAN
from mmmamba.ablation.tables import Measured
from mmmamba.report.plot_style import GRID, INK, PALETTE, TITLE, Theme, label, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.34  # inches a cell


def dots(measured: Measured, theme: Theme = "light") -> Figure:
    """Cells from top to bottom; per cent kept of the teacher to the right. First the mean, then abilities outside it.

    A dot is the mean over seeds, a bar its 95 % t interval, a small ring one seed.
    """
    table, beside = measured.plan.tables[measured.name], measured.plan.questions.beside
    cells = [cell for cell, seeds in measured.cells.items() if seeds]
    panels = [[MEAN], *([list(beside)] if beside else [])]
    figure = new_figure(4.8 * len(panels) + 1.2, 1.6 + ROW * max(len(cells), 2), theme)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, abilities in zip(axes, panels, strict=True):
        _panel(axis, measured, cells, abilities, theme)
    axes[0].set_yticks(range(len(cells)), [label(cell) for cell in cells])
    axes[0].set_ylim(len(cells) - 0.5, -0.5)
    axes[0].set_title("mean", loc="left", fontsize=10, color=INK[theme])
    if beside:
        axes[1].legend(fontsize=8, frameon=False, labelcolor=INK[theme], loc="lower left", ncols=len(beside),
                       bbox_to_anchor=(0, 1.0), borderaxespad=0)  # fmt: skip
    if table.reference in cells:
        kept = measured.interval(str(table.reference))
        if kept is not None:
            axes[0].axvline(kept.value, color=INK[theme], linewidth=0.8, alpha=0.5, zorder=0)
    figure.suptitle(label(table.title, TITLE), x=0.01, ha="left", fontsize=11, color=INK[theme])
    figure.supxlabel("kept of the teacher, % (dot: mean over seeds, bar: 95 % t interval, ring: a seed)", fontsize=9,
                     color=INK[theme])  # fmt: skip
    return figure


def _panel(axis: Axes, measured: Measured, cells: list[str], abilities: list[str], theme: Theme) -> None:
    style(axis, theme)
    axis.grid(False, axis="y")
    axis.grid(axis="x", color=GRID[theme], linewidth=0.8)
    shown: list[float] = []
    for k, ability in enumerate(abilities):
        colour = PALETTE[(k + (ability != MEAN)) % len(PALETTE)]
        shift = 0.22 * (k - (len(abilities) - 1) / 2)
        for row, cell in enumerate(cells):
            interval = measured.interval(cell, ability)
            if interval is None:
                continue
            seeds = list(measured.retention(cell, ability).values())
            shown += seeds
            axis.plot(seeds, [row + shift] * len(seeds), "o", markersize=4, markerfacecolor="none", color=colour,
                      alpha=0.6)  # fmt: skip
            axis.plot([interval.value], [row + shift], "o", markersize=6, color=colour)
            if math.isfinite(interval.low):
                axis.plot([interval.low, interval.high], [row + shift] * 2, color=colour, linewidth=2)
        axis.plot([], [], "o", color=colour, label=label(ability))
    # The seeds set the limits of the axis: the interval of three seeds that differ may be wider than the page.
    if shown:
        margin = max(1.0, 0.35 * (max(shown) - min(shown)))
        axis.set_xlim(max(min(shown) - margin, -2), min(max(shown) + margin, 102))
