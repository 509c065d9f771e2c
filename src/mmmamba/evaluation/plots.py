"""Figures of a report: scores by ability and loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmmamba.evaluation.aggregate import Report
from mmmamba.report.plot_style import GRID, INK, PALETTE, Theme, label, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLIND = "#9aa3ad"
WIDEST = 13.0  # inches: wider than this, the letters get too small on a screen


@dataclass(frozen=True)
class Curve:
    """The loss of one run in one stage."""

    label: str
    stage: str
    steps: Sequence[float]
    losses: Sequence[float]


def ability_bars(report: Report, theme: Theme = "light") -> Figure:
    """Two panels: exact match with 95 % intervals, and retention against each model's teacher (where it has one)."""
    students = [model for model in report.models if model.retention is not None and not model.blind]
    groups = [*report.abilities, "mean"]
    width = min(max(8.0, 1.2 + len(groups) * (0.30 + 0.17 * len(report.models))), WIDEST)
    figure = new_figure(width, 7.4 if students else 4.2, theme)
    top, *rest = figure.subplots(2 if students else 1, 1, squeeze=False, sharex=True)[:, 0]
    colours = model_colours(report)
    scores = {
        m.label: [(a.score.value, a.score.low, a.score.high) for a in (*m.abilities.values(), m.mean)]
        for m in report.models
    }
    _bars(top, groups, scores, colours, theme)
    top.set_ylabel("score, %")
    top.set_title("Score by ability (bars: mean, whiskers: 95 % interval)", loc="left", fontsize=11)
    handles, labels = top.get_legend_handles_labels()
    top.legend(
        handles, labels, ncols=min(len(labels), 5), fontsize=9, frameon=False,
        loc="lower left", bbox_to_anchor=(0, 1.08), borderaxespad=0, labelcolor=INK[theme],
    )  # fmt: skip
    if rest:
        kept = {
            m.label: [
                (a.retention.value, a.retention.low, a.retention.high) if a.retention else (math.nan,) * 3
                for a in (*m.abilities.values(), m.mean)
            ]
            for m in students
        }
        _bars(rest[0], groups, kept, colours, theme)
        rest[0].axhline(100, color=INK[theme], linewidth=0.8, alpha=0.6)
        rest[0].set_ylabel("retention, %")
        rest[0].set_title("Retention: student / teacher, capped at 100 %", loc="left", fontsize=11)
    return figure


def loss_curves(curves: Sequence[Curve], theme: Theme = "light") -> Figure:
    """One panel per stage, one line per run: the raw loss faint, its running mean on top; log scale."""
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    runs = list(dict.fromkeys(curve.label for curve in curves))
    columns = min(len(stages), 3)
    rows = math.ceil(len(stages) / columns)
    figure = new_figure(max(4.2 * columns, 5.0), 3.1 * rows + 0.5, theme)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, stage in zip(axes, stages, strict=False):
        style(axis, theme)
        for curve in (curve for curve in curves if curve.stage == stage):
            colour = PALETTE[runs.index(curve.label) % len(PALETTE)]
            smooth = running_mean(curve.losses)
            axis.plot(curve.steps, curve.losses, color=colour, alpha=0.22, linewidth=0.8)
            axis.plot(curve.steps, smooth, color=colour, linewidth=1.8, label=label(curve.label))
        if all(loss > 0 for curve in curves if curve.stage == stage for loss in curve.losses):
            axis.set_yscale("log")
        axis.set_title(label(stage), loc="left", fontsize=11)
        axis.set_xlabel("step")
    for axis in axes[len(stages) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("loss")
    axes[0].legend(fontsize=9, frameon=False, labelcolor=INK[theme])
    return figure


def running_mean(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Exponential running mean over about ``share`` of the curve, without the usual bias towards the start value."""
    decay = 1 - 1 / max(len(values) * share, 1)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth


def model_colours(report: Report) -> dict[str, str]:
    """Label → colour; blind rows are grey."""
    colours: dict[str, str] = {}
    seeing = [model.label for model in report.models if not model.blind]
    for model in report.models:
        colours[model.label] = BLIND if model.blind else PALETTE[seeing.index(model.label) % len(PALETTE)]
    return colours


def _bars(
    axis: Axes,
    groups: Sequence[str],
    values: Mapping[str, Sequence[tuple[float, float, float]]],
    colours: Mapping[str, str],
    theme: Theme,
) -> None:
    """Grouped bars in per cent. ``values``: label → per group (value, low, high) in [0, 1]; NaN draws nothing."""
    style(axis, theme)
    width = 0.82 / max(len(values), 1)
    for k, (name, row) in enumerate(values.items()):
        places = [g - 0.41 + width * (k + 0.5) for g in range(len(groups))]
        heights = [100 * value for value, _, _ in row]
        errors = [[100 * (v - low) for v, low, _ in row], [100 * (high - v) for v, _, high in row]]
        axis.bar(places, heights, width * 0.9, color=colours[name], label=label(name))
        axis.errorbar(places, heights, yerr=errors, fmt="none", ecolor=INK[theme], elinewidth=0.9, alpha=0.75)
    axis.set_ylim(0, 104)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_xticks(range(len(groups)), [label(group) for group in groups])
    if groups[-1] == "mean":
        axis.axvline(len(groups) - 1.5, color=GRID[theme], linewidth=1.2)
