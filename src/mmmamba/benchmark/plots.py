"""A report's plots: latency, memory, throughput and time to the first token against the context, log over log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmmamba.benchmark.claims import CONTEXT, DEVICE, POINTS
from mmmamba.benchmark.measure import Measured
from mmmamba.benchmark.results import Results, Task, What
from mmmamba.benchmark.subjects import Series
from mmmamba.report.plot_style import GRID, INK, PALETTE, TITLE, Theme, label, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {"engine": "-", "int8": "--", "published": "-.", "published, mask": ":"}
MARKERS = {"engine": "o", "int8": "o", "published": "s", "published, mask": "s"}
WIDTH, HEIGHT = 8.6, 4.8  # inches


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a figure shows.

    Attributes:
        variants: which points, and the line that they get; None for the line of the series' style.
        value: what is drawn of a point.
        limit: also draw the least time that the machine could take.
        paper: the paper's own value for a kind of model, in the figure's unit.
    """

    title: str
    caption: str
    unit: str
    what: What
    variants: Mapping[str, str | None]
    value: Callable[[Measured], float]
    limit: bool = False
    paper: Mapping[str, float] | None = None


PLOTS: Mapping[str, Plot] = {
    "latency": Plot(
        title="Next-token latency, one sequence",
        caption="Next-token latency against the context; dashed: int8 weights; thin dotted: the least time that "
        "this machine could take, with the models' own weights",
        unit="ms",
        what="decode",
        variants={"": None},
        value=lambda m: m.timing.ms,
        limit=True,
        paper={point.kind: point.ms for point in POINTS},
    ),
    "memory": Plot(
        title="Memory while decoding, one sequence",
        caption="Memory while decoding against the context, weights included; dashed: with the int8 copies too",
        unit="GB",
        what="decode",
        variants={"": None},
        value=lambda m: m.held_bytes / 1e9,
        paper={point.kind: point.gigabytes for point in POINTS},
    ),
    "throughput": Plot(
        title="Tokens a second at the greatest batch that fits",
        caption="Tokens a second at the greatest batch that fits; dashed: states in bfloat16",
        unit="tokens/s",
        what="batch",
        variants={"cache": "-", "float32": "-", "bfloat16": "--"},
        value=lambda m: m.tokens_per_s,
    ),
    "prefill": Plot(
        title="Time to the first token",
        caption="Time to the first token against the prompt's length; dashed: prompts of pictures",
        unit="ms",
        what="prefill",
        variants={"text": "-", "images": "--"},
        value=lambda m: m.timing.ms,
    ),
}


def draw(results: Results, name: str, theme: Theme = "light") -> Figure | None:
    """The figure of that name; None when the report has no point of it."""
    plot = PLOTS[name]
    points = [point for point in results.points if point.task.what == plot.what]
    if not any(point.measured is not None for point in points):
        return None
    figure = new_figure(WIDTH, HEIGHT, theme)
    axis = figure.subplots()
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    style(axis, theme)
    colours = _colours(results)
    full: list[tuple[Task, str]] = []
    for series in results.series:
        for variant, line in plot.variants.items():
            found = sorted(
                (p.task.context, p.measured)
                for p in points
                if p.task.series == series.label and p.task.variant == variant and p.measured is not None
            )  # fmt: skip
            colour = colours[series.subject]
            if found:
                _line(axis, plot, series, variant, found, line or LINES[series.style], colour)
                if plot.limit and series.style == "engine":
                    limits = [results.limit_ms(measured) for _, measured in found]
                    axis.plot([x for x, _ in found], limits, ":", color=colour, linewidth=0.9, alpha=0.7)
            full += [
                (p.task, colour) for p in points if p.oom and (p.task.series, p.task.variant) == (series.label, variant)
            ]
    _mark_full(axis, full, theme)
    if plot.paper is not None and results.paper:
        _mark_paper(axis, plot.paper, results, colours)
    _finish(axis, plot, results, theme)
    return figure


def _line(
    axis: Axes,
    plot: Plot,
    series: Series,
    variant: str,
    found: list[tuple[int, Measured]],
    line: str,
    colour: str,
) -> None:
    name = f"{series.label}, {variant}" if len(plot.variants) > 1 and variant != "cache" else series.label
    values = [plot.value(measured) for _, measured in found]
    marker = MARKERS[series.style]
    axis.plot(
        [x for x, _ in found], values, line, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label(name)
    )


def _mark_full(axis: Axes, full: list[tuple[Task, str]], theme: Theme) -> None:
    """A cross at the top, above the context at which a line ran out of memory."""
    height: dict[int, int] = {}  # crosses at one context are drawn below each other
    for task, colour in full:
        row = height[task.context] = height.get(task.context, 0) + 1
        axis.plot(
            task.context, 1.0 - 0.045 * row, "x", color=colour, markersize=8, markeredgewidth=2,
            transform=axis.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    if full:
        axis.plot([], [], "x", color=INK[theme], markersize=8, markeredgewidth=2, label="out of memory")


def _mark_paper(axis: Axes, values: Mapping[str, float], results: Results, colours: Mapping[str, str]) -> None:
    by_kind = {one.kind: colours[one.subject] for one in results.series}
    for kind, value in values.items():
        if kind in by_kind:
            name = f"the paper's {kind} ({DEVICE})"
            axis.plot(CONTEXT, value, "*", color=by_kind[kind], markersize=13, linestyle="none", label=label(name))


def _finish(axis: Axes, plot: Plot, results: Results, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    contexts = results.contexts
    axis.set_xticks(contexts, [short(context) for context in contexts])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # the figure may span less than a decade
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.minorticks_off()
    axis.set_xlim(contexts[0] / 1.3, contexts[-1] * 1.3)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(plot.unit)
    axis.set_title(label(f"{plot.title} ({results.environment['device']})", TITLE), loc="left", fontsize=11)
    axis.grid(axis="x", color=GRID[theme], linewidth=0.5)
    axis.legend(
        fontsize=8,
        frameon=False,
        labelcolor=INK[theme],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.3,
        handlelength=3.2,
    )


def _colours(results: Results) -> dict[str, str]:
    """Subject → colour: the same in every plot."""
    subjects = list(dict.fromkeys(one.subject for one in results.series))
    return {subject: PALETTE[i % len(PALETTE)] for i, subject in enumerate(subjects)}


def short(tokens: int) -> str:
    """A power of two in short, 1,024 as 1k. Other numbers in full: 103,424, the paper's "103K", is 101 times 1k."""
    if tokens & (tokens - 1) or tokens < 2**10:
        return f"{tokens:,}"
    return f"{tokens >> 20}m" if tokens >= 2**20 else f"{tokens >> 10}k"
