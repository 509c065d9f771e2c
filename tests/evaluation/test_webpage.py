"""The one-file page: nothing is fetched, everything is escaped, and every part is there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from question_files import picture

from mmmamba.data.sample import Sample, Turn
from mmmamba.errors import UserError
from mmmamba.evaluation import plots, webpage
from mmmamba.evaluation.aggregate import Report, Row, assemble
from mmmamba.evaluation.predict import Answers
from mmmamba.evaluation.report import markdown, to_data
from mmmamba.evaluation.suite import Item, Suite
from mmmamba.evaluation.tables import tables
from mmmamba.evaluation.webpage import write_html
from mmmamba.inference.likelihood import Score
from mmmamba.progress import Terminal
from mmmamba.report.plot_style import render
from mmmamba.report.table import show


def made_report(image: Path, says: dict[str, Callable[[int], str]]) -> Report:
    """A report from made-up answers: label → what it says to question i (right: "yes")."""
    abilities = ("read", "count")
    turns = (Turn("human", "<image>\nIs it <b>red</b>?"), Turn("gpt", "yes"))
    items = tuple(
        Item(
            sample=Sample(id=f"{ability}-{i}", turns=turns, images=(str(image),)), ability=ability, references=("yes",)
        )
        for ability in abilities
        for i in range(10)
    )
    suite = Suite(name="made up", metric="exact", items=items, max_new_tokens=4, source="nowhere")
    rows = []
    for label, say in says.items():
        answers = Answers(texts={i: say(i) for i in range(len(items))})
        answers.likelihood = {i: Score(nll=0.5, tokens=2) for i in range(len(items))}
        against = None if label == "teacher" else "teacher"
        rows.append(Row(label=label, path="p", layers="l", answers=answers, against=against, blind=label == "blind"))
    return assemble(suite, rows, seed=0, request={}, environment={"torch": "2"})


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return made_report(
        picture(tmp_path / "p.png"),
        {"teacher": lambda i: "yes", "linear": lambda i: "yes" if i % 2 else "</dd><script>", "blind": lambda i: "no"},
    )


class Links(HTMLParser):
    """Everything that a browser would load, and the tags that are open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]


def test_page_is_self_contained_and_complete(report: Report, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"stage": f"stage{s}", "step": i, "loss": 1 / (i + 1)} for s in (1, 2) for i in range(20)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "saved"}\n')
    examples = webpage.pick_examples(report, 5)
    path = write_html(
        tmp_path / "report.html", title="A <demo>", summary="All of it.", report=report, curves={"linear": metrics},
        examples=examples, notes=["ran on a CPU"],
    )  # fmt: skip
    page = path.read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.sources
    assert all(source.startswith("data:image/") for source in links.sources)
    assert not re.search(r"@import|url\(", page.split("</style>")[0])
    assert "script" not in links.tags
    assert "b" not in links.tags
    assert links.tags.count("article") == 5
    assert links.tags.count("table") == len(tables(report))
    for text in ("A &lt;demo&gt;", "All of it.", "Loss curves", "ran on a CPU", "keeps 50.0 % of teacher", "torch"):
        assert text in page


def test_examples_take_turns_over_abilities_whatever_the_answers(report: Report) -> None:
    examples = webpage.pick_examples(report, 4)
    assert [example.ability for example in examples] == ["read", "count", "read", "count"]
    assert examples[0].question == "Is it <b>red</b>?"
    assert [answer.correct for answer in examples[0].answers] == [True, False, False]


def test_a_teacher_that_scores_nothing_leaves_no_number(tmp_path: Path) -> None:
    report = made_report(
        picture(tmp_path / "p.png"), {"teacher": lambda i: "no", "linear": lambda i: "yes", "blind": lambda i: "no"}
    )
    linear = report.model("linear")
    assert linear.retention is None
    assert linear.abilities["read"].retention_over_chance is None
    json.dumps(to_data(report), allow_nan=False)
    assert "–" in markdown(report)
    render(plots.ability_bars(report), "png")
    write_html(tmp_path / "r.html", title="t", report=report)


def test_markdown_and_plain_tables_say_the_same(report: Report) -> None:
    score, retention = tables(report)[:2]
    assert score.columns == ["model", "read", "count", "mean"]
    assert retention.rows[0] == ["linear", "teacher", "50.0", "50.0", "50.0"]
    assert "| linear | teacher | 50.0 [" in retention.markdown()
    file = io.StringIO()
    show(score, Terminal(file=file, width=200))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ["linear", "50.0", "50.0", "50.0", "31.4–68.6"] in lines
    assert all(table.title in markdown(report) for table in tables(report))


def test_figures_repeat_bit_for_bit(report: Report) -> None:
    one, two = (render(plots.ability_bars(report), "svg") for _ in range(2))
    assert one == two


def test_curves_name_a_broken_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "stage": "s", "loss": 2}\n{"step"\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        webpage.read_curves("run", metrics)


def test_long_runs_make_light_curves(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "stage": "s", "loss": 2.0}) + "\n" for i in range(1801)))
    (curve,) = webpage.read_curves("run", metrics)
    assert len(curve.steps) <= webpage.CURVE_POINTS
    assert set(curve.losses) == {2.0}
    assert plots.running_mean([2.0] * 7) == pytest.approx([2.0] * 7)
