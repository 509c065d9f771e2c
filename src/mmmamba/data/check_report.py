"""What a survey of a conversation set found: tables for the terminal, and a report of Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmamba.data.check_survey import SHOWN, BadList
from mmmamba.locks import alone_in
from mmmamba.outputs import Ledger
from mmmamba.report.plot_style import PALETTE, new_figure, render, style
from mmmamba.report.table import Table, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERB = "data check"
FILES = ("check.png", "check.svg", "check.md", "check.json")  # what --out holds
BAR = 24  # characters of the longest bar

NONE = "–"  # printed instead of a number if there is nothing to count
PANELS = {"lengths": "Tokens of a sample, before cutting", "tiles": "Tiles of a sample", "cut": "Tokens cut off"}


def _share(scored: float | None) -> str:
    return "" if scored is None else f", {100 * scored:.1f} % scored"


def _spread(lengths: Mapping[str, Any]) -> str:
    found = [f"{name} {lengths[name]:,}" for name in ("median", "p90", "p99", "largest") if lengths[name] is not None]
    return ", ".join(found) or NONE


def tables(found: Mapping[str, Any], bad: BadList) -> list[Table]:
    """What a survey found, as tables; the first :data:`SHOWN` bad samples come last."""
    lengths, cut, speed, twice = found["lengths"], found["cut"], found["speed"], found["duplicates"]
    limit = "the teacher's own" if found["max_tiles"] is None else found["max_tiles"]
    rows: list[Sequence[Any]] = [
        ("read as", f"{found['teacher']}; at most {found['max_length']:,} tokens, tiles: {limit}"),
        ("samples", f"{found['samples']:,}: {found['good']:,} good, {found['bad']:,} bad"),
        ("pictures", f"{found['images']:,}"),
        ("turns", f"{found['turns']:,}"),
        ("tokens", f"{found['tokens']:,}" + _share(found["scored_share"])),
        ("tokens of a sample", _spread(lengths)),
        ("samples cut", f"{cut['samples']:,}; {cut['tokens']:,} tokens lost"),
        ("samples with nothing scored", f"{found['nothing_scored']:,}"),
        ("ids that occur twice", f"{twice['ids']:,}, on {twice['samples']:,} samples" if twice["ids"] else "0"),
        *(("", f"{one['id']!r}, lines {', '.join(map(str, one['lines']))}") for one in twice["examples"]),
        (
            "speed",
            f"{speed['samples_a_minute']:,.0f} samples a minute in all ({max(speed['workers'], 1)} at once)"
            + ("" if speed["samples_a_minute_a_worker"] is None
               else f", {speed['samples_a_minute_a_worker']:,.0f} a worker"),
        ),
        ("slowest", ", ".join(f"line {one['line']} ({one['seconds']:.3g} s)" for one in speed["slowest"])),
    ]  # fmt: skip
    shown = [table_of(str(found["file"]), ("", "found"), rows)]
    for key, title in PANELS.items():
        bars = found[key]["histogram"]
        if bars:
            largest = max(bar["samples"] for bar in bars)
            rows = [
                (
                    str(bar["from"]) if bar["from"] == bar["to"] else f"{bar['from']:,} to {bar['to']:,}",
                    bar["samples"],
                    f"{100 * bar['samples'] / found[key]['samples']:.1f} %",
                    "█" * -(-BAR * bar["samples"] // largest),
                )
                for bar in bars
            ]
            shown.append(table_of(title, (key, "samples", "share", ""), rows))
    if bad.count:
        shown.append(table_of("What is wrong", ("reason", "samples"), found["bad_kinds"].items()))
        more = "" if bad.count <= SHOWN else f", the first {SHOWN} of {bad.count:,}"
        rows = [(f"{found['file']}:{line}", reason) for line, reason in bad.first]
        shown.append(table_of(f"Bad samples{more}", ("where", "reason"), rows))
    return shown


def write_report(found: Mapping[str, Any], bad: BadList, out: Path) -> None:
    """Write check.json, check.md, check.png and check.svg into ``out``; check.json has every bad sample."""

    def write_json(path: Path) -> None:
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        with path.open("w", encoding="utf-8") as file:
            file.write(text.removesuffix("\n}") + ',\n  "bad_samples": [')
            for block in bad.blocks():
                file.write(block)
            file.write("\n  ]\n}\n" if bad.count else "]\n}\n")

    page = "\n".join(
        ["# What is in the data, and what is wrong with it", "", "![Histograms](check.svg)", ""]
        + [table.markdown(level=2) for table in tables(found, bad)]
        + ([] if bad.count <= SHOWN else ["`check.json` lists every bad sample.", ""])
    )
    figure = plot(found)
    with alone_in(out):
        Ledger(out, VERB).write(
            {
                "check.png": render(figure, "png"),
                "check.svg": render(figure, "svg"),
                "check.md": page.encode(),
                "check.json": write_json,  # written last: if it is there, the others are too
            }
        )


def plot(found: Mapping[str, Any]) -> Figure:
    """One panel for each histogram that is not empty."""
    panels = {key: title for key, title in PANELS.items() if found[key]["histogram"]} or {"lengths": PANELS["lengths"]}
    figure = new_figure(4.6 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title), colour in zip(axes, panels.items(), PALETTE, strict=False):
        bars = found[key]["histogram"]
        axis.bar(range(len(bars)), [bar["samples"] for bar in bars], 0.9, color=colour)
        names = [f"{bar['from']:,}" for bar in bars]
        if bars and bars[-1]["to"] - bars[-1]["from"] > bars[0]["to"] - bars[0]["from"]:
            names[-1] = f"≥ {names[-1]}"
        axis.set_xticks(range(len(bars)), names, rotation=45 if len(bars) > 6 else 0)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_ylabel("samples")
        style(axis)
    return figure
