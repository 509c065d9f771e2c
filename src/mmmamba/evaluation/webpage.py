"""One self-contained HTML page: scores, tables, loss curves and pictures with every model's answer.

Nothing is fetched: style, plots and pictures are in the file. Plots exist twice, for light and dark readers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from mmmamba.checkpoints.io import write_atomically
from mmmamba.data.image_decoding import load_image
from mmmamba.errors import UserError
from mmmamba.evaluation import plots
from mmmamba.evaluation.aggregate import ModelResult, Report
from mmmamba.evaluation.plots import Curve
from mmmamba.evaluation.tables import tables
from mmmamba.jsonfile import read_lines
from mmmamba.report import html
from mmmamba.report.plot_style import THEMES
from mmmamba.report.table import Table

PICTURE_SIDE = 384  # larger pictures are shrunk to this
PIXEL_ART = 200  # pictures smaller than this are shown enlarged with hard pixels
PICTURES_SHOWN = 4
QUESTION_CHARACTERS = 280
CURVE_POINTS = 500
TABLES_OPEN = 2  # the rest of a report's tables unfold at a click


@dataclass(frozen=True)
class Answer:
    """What one model said. ``correct`` None: not judged."""

    label: str
    text: str
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question as a person sees it, with everyone's answer."""

    images: Sequence[str | Path]
    question: str
    reference: str
    answers: Sequence[Answer]
    ability: str = ""


def write_html(
    path: str | Path,
    *,
    title: str,
    summary: str = "",
    report: Report | None = None,
    extra_tables: Sequence[Table] = (),
    curves: Mapping[str, str | Path] | None = None,
    examples: Sequence[Example] = (),
    notes: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Write the page, and return its path.

    Args:
        path: the HTML file.
        title, summary: the heading and the sentence under it.
        report: an evaluation; gives the tiles, the bars and its tables.
        extra_tables: tables to show after the report's own.
        curves: run → its ``metrics.jsonl`` (lines with ``step``, ``stage`` and ``loss``).
        examples: pictures with each model's answer; see `pick_examples`.
        notes: sentences shown as a list near the end (what was run, what to keep in mind).
        environment: versions, device and the like; the report's own when omitted.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    if summary:
        body.append(f'<p class="lead">{escape(summary)}</p>')
    if report is not None:
        body += [_tiles(report), _bars(report)]
    own = tables(report) if report is not None else []
    if own or extra_tables:
        body += ["<h2>Results</h2>", *map(html.table, [*own[:TABLES_OPEN], *extra_tables])]
        body += [html.table(table, folded=True) for table in own[TABLES_OPEN:]]
    lines = [curve for label, file in (curves or {}).items() for curve in read_curves(label, file)]
    if lines:
        body += ["<h2>Loss curves</h2>", _curves(lines)]
    if examples:
        body += ["<h2>Pictures and answers</h2>", '<div class="examples">', *map(_example, examples), "</div>"]
    if notes:
        body += html.listed("Notes", notes)
    if environment is None and report is not None:
        environment = report.environment
    if environment:
        body += html.facts("Environment", environment)
    whole = html.page(title, body)
    return write_atomically(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))


def pick_examples(report: Report, count: int = 12) -> list[Example]:
    """The first questions of each ability in turn, not chosen by their answers; all have pictures."""
    queues = [
        [i for i, item in enumerate(report.items) if item.ability == ability and item.sample.images]
        for ability in report.abilities
    ]
    turns = [queue[k] for k in range(count) for queue in queues if k < len(queue)]
    examples = []
    for i in turns[:count]:
        item = report.items[i]
        said = [report.predictions[model.label][i] for model in report.models]
        answers = [Answer(m.label, p.prediction, p.correct) for m, p in zip(report.models, said, strict=True)]
        examples.append(
            Example(
                images=item.sample.images,
                question=item.prompt.replace("<image>", "").strip(),
                reference=" / ".join(dict.fromkeys(item.references)),
                answers=answers,
                ability=item.ability,
            )
        )
    return examples


def read_curves(label: str, path: str | Path) -> list[Curve]:
    """The loss of each stage in a ``metrics.jsonl``; lines without a loss are skipped."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such metrics file")
    stages: dict[str, tuple[list[float], list[float]]] = {}
    for record in read_lines(file):
        if isinstance(record.get("loss"), (int, float)) and isinstance(record.get("step"), (int, float)):
            steps, losses = stages.setdefault(str(record.get("stage", "loss")), ([], []))
            steps.append(record["step"])
            losses.append(record["loss"])
    return [_thinned(Curve(label, stage, steps, losses)) for stage, (steps, losses) in stages.items()]


def _thinned(curve: Curve) -> Curve:
    """At most CURVE_POINTS points, each the mean of its neighbours: a long run must not make a heavy page."""
    size = -(-len(curve.steps) // CURVE_POINTS)
    starts = range(0, len(curve.steps), size)
    steps = [sum(curve.steps[i : i + size]) / len(curve.steps[i : i + size]) for i in starts]
    losses = [sum(curve.losses[i : i + size]) / len(curve.losses[i : i + size]) for i in starts]
    return Curve(curve.label, curve.stage, steps, losses)


# --- pieces of the page -----------------------------------------------------------------------------------------------


def _tiles(report: Report) -> str:
    colours = plots.model_colours(report)
    tiles = [_tile(model, colours[model.label], len(report.abilities)) for model in report.models]
    return '<div class="tiles">' + "".join(tiles) + "</div>"


def _tile(model: ModelResult, colour: str, abilities: int) -> str:
    small = f"mean of {abilities} abilities" if abilities > 1 else f"{model.mean.n} questions"
    if model.retention is not None and not model.blind:
        small = f"keeps {100 * model.retention.value:.1f} % of {model.against}"
    elif model.blind:
        small = "pictures blanked: guessing"
    return (
        f'<div class="card tile" style="--c:{colour}"><div class="name">{escape(model.label)}</div>'
        f'<div class="big">{100 * model.mean.score.value:.1f} %</div><div class="small">{escape(small)}</div></div>'
    )


def _bars(report: Report) -> str:
    light, dark = (plots.ability_bars(report, theme) for theme in THEMES)
    return html.figure(light, dark, "Scores by ability, and retention against each model's teacher")


def _curves(curves: Sequence[Curve]) -> str:
    light, dark = (plots.loss_curves(curves, theme) for theme in THEMES)
    return html.figure(light, dark, "Loss by step of each stage: the running mean over the raw values")


def _example(example: Example) -> str:
    pictures = "".join(_picture(path) for path in example.images[:PICTURES_SHOWN])
    if len(example.images) > PICTURES_SHOWN:
        pictures += f'<span class="tag">and {len(example.images) - PICTURES_SHOWN} more</span>'
    answers = "".join(
        f"<dt>{escape(a.label)}</dt><dd{_verdict(a)}>{escape(a.text) or '<i>(nothing)</i>'}</dd>"
        for a in example.answers
    )
    return (
        '<article class="card example">'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + (f'<span class="tag">{escape(example.ability)}</span>' if example.ability else "")
        + _question(example.question)
        + f"<dl><dt>reference</dt><dd>{escape(example.reference)}</dd>{answers}</dl></article>"
    )


def _question(text: str) -> str:
    """The end of a long question, which asks it; the whole text unfolds at a click."""
    if len(text) <= QUESTION_CHARACTERS:
        return f'<p class="question">{escape(text)}</p>'
    return (
        f'<p class="question">… {escape(text[-QUESTION_CHARACTERS:])}</p>'
        f'<details><summary>all {len(text):,} characters</summary><div class="full">{escape(text)}</div></details>'
    )


def _verdict(answer: Answer) -> str:
    return "" if answer.correct is None else f' class="{"right" if answer.correct else "wrong"}"'


def _picture(path: str | Path) -> str:
    image = load_image(str(path), str(path))
    pixels = ' class="pixels"' if max(image.size) < PIXEL_ART else ""
    if max(image.size) > PICTURE_SIDE:
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Small synthetic pictures stay exact; photographs are lighter as JPEG.
    kind = "PNG" if pixels else "JPEG"
    image.save(buffer, kind, **({"optimize": True} if pixels else {"quality": 85}))
    return f'<img{pixels} alt="" loading="lazy" src="{html.data_url(f"image/{kind.lower()}", buffer.getvalue())}">'
