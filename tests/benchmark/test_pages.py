"""Pages say what their results hold: blocks are made of them, figures in prose are checked; so do this repository's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from documents import PAGES, ROOT
from mmmamba import cli
from mmmamba.benchmark import bench as verb
from mmmamba.benchmark.bench import bench
from mmmamba.benchmark.compare import comparison
from mmmamba.benchmark.pages import beyond, fill, filled, wrong_figures
from mmmamba.benchmark.results import Results, read
from mmmamba.errors import UserError
from mmmamba.model.geometries import GEOMETRIES
from tiny import make_config

RESULTS = ROOT / "docs" / "results"
EVERY = (*PAGES, *sorted(RESULTS.glob("*.md")))
BLOCK = "<!-- bench: {} of run.json{} -->\n<!-- /bench -->"


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_our_pages_hold_what_their_results_say(page: Path):
    assert filled(page) == page.read_text(encoding="utf-8")
    assert not wrong_figures(page)


def test_our_results_of_efficiency_have_a_page():
    if not (RESULTS / "efficiency-h100.json").is_file():
        pytest.skip("no run on a GPU has been written down yet")
    assert "<!-- bench: " in (RESULTS / "efficiency.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results.json of a real run, as small as there can be."""
    folder = tmp_path_factory.mktemp("bench") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GEOMETRIES, "tiny", make_config())
        patch.setitem(verb.SAMPLE_SECONDS, "cpu", 0.0)
        patch.setattr("mmmamba.benchmark.measure.MOST_SEQUENCES", {"cpu": 3})
        patch.setattr("mmmamba.benchmark.memory.release", lambda device: None)
        patch.setattr(verb, "write_report", lambda results, folder: folder)
        bench(geometry="tiny", contexts="8,32", report=folder, device="cpu", measure=("decode", "batch"))
    return folder / "results.json"


@pytest.fixture
def results(made: Path) -> Results:
    return read(made)


@pytest.fixture
def page(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_bytes(made.read_bytes())
    return tmp_path / "page.md"


def test_blocks_are_made_of_the_results_and_stay(page, results):
    page.write_text(f"# Efficiency\n\nprose\n\n{BLOCK.format('protocol, latency.svg, machine, notes', '')}\n\nmore\n")
    assert fill(page) == []
    text = page.read_text()
    device = results.environment["device"]
    assert f"### The paper's protocol, after a context of 32 tokens ({device})\n" in text
    assert f"({device})](run-latency.svg)" in text and (page.parent / "run-latency.svg").is_file()
    assert f"- torch: {results.environment['torch']}\n" in text and "bounded by 3 sequences" in text
    assert text.startswith("# Efficiency\n\nprose\n") and text.endswith("<!-- /bench -->\n\nmore\n")
    assert filled(page) == text
    page.write_text(text.replace("teacher, published style", "another"))
    assert filled(page) == text
    page.write_text("nothing to fill, `<!-- bench: x of y.json -->`\n")
    assert fill(page) == [] and page.read_text().startswith("nothing")


def test_contexts_beyond_what_another_machine_held(page, results, made):
    found = json.loads(made.read_text())
    for point in found["points"]:
        if point["task"] == {"series": "teacher", "what": "decode", "variant": "", "context": 32}:
            point.update(measured=None, oom=True)
    (page.parent / "small.json").write_text(json.dumps(found))
    assert beyond(results, results).points == ()
    only = beyond(results, read(page.parent / "small.json"))
    assert only.contexts == [32] and len(only.points) == len(results.points) / 2
    assert beyond(results, replace(results, points=only.points)).contexts == [8]  # what was not asked there
    page.write_text(BLOCK.format("latency", " beyond small.json"))
    fill(page)
    assert "| model | 32 |" in page.read_text()


def test_a_mark_that_is_wrong_is_named_with_its_line(page):
    for text, said in (
        ("\n<!-- bench: protocol of run.json -->\nno end\n", ":2: the block that begins here has no end; write"),
        (
            BLOCK.format("protocol", "")[:-15] + BLOCK.format("growth", ""),
            ":2: a block begins inside the one of line 1",
        ),
        (BLOCK.format("protocol", "").replace("run", "walk"), "there is no "),
        (BLOCK.format("proto", ""), ":1: a report has no 'proto'; it has protocol, optimised"),
        ("<!-- bench protocol -->", ":1: a block begins with <!-- bench: PART, … of FILE.json -->"),
    ):
        page.write_text(text)
        with pytest.raises(UserError, match=said):
            filled(page)
    with pytest.raises(UserError, match="no such file"):
        filled(page.with_name("other.md"))


def test_figures_in_prose(page, results):
    linear, teacher = (results.measured(one, "decode", 32) for one in ("linear", "teacher, published style"))
    batch = results.measured("linear", "batch", 8, "bfloat16")
    ratio, less = teacher.timing.ms / linear.timing.ms, 100 * abs(linear.resident_bytes / teacher.resident_bytes - 1)
    places = "teacher, published style.decode.32.{0} / linear.decode.32.{0}"
    right = [
        f"It takes {linear.timing.ms:.3f} ms<!-- from run.json: linear.decode.32.ms -->,",
        f"{ratio:.2f}×<!-- from run.json: {places.format('ms')} --> less, and differs by",
        f"{less:,.1f} %<!-- from run.json: linear.decode.32.GB / teacher, published style.decode.32.GB --> in memory;",
        f"| **{batch.tokens_per_s:,.0f} tokens/s**<!-- from run.json: linear.batch.bfloat16.8.tokens_per_s --> |",
    ]
    page.write_text("\n".join(right))
    assert wrong_figures(page) == []
    page.write_text(right[0].replace("takes ", "takes 1"))
    assert len(wrong_figures(page)) == 1 and ":1: says 1" in wrong_figures(page)[0]
    for place, said in (
        ("linear.decode.32", "is no SERIES.WHAT"),
        ("linear.decode.32.miles", "a figure is one of ms, s"),
        ("linear.decode.64.ms", "nothing was measured at 'linear.decode.64.ms'"),
    ):
        page.write_text(f"1.5<!-- from run.json: {place} -->")
        with pytest.raises(UserError, match=said):
            wrong_figures(page)
    page.write_text("so fast <!-- from run.json: linear.decode.32.ms -->")
    with pytest.raises(UserError, match=":1: no figure comes before"):
        wrong_figures(page)
    page.write_text("`1 ms<!-- from FILE: PLACE -->`\n\n```\n1<!-- from FILE: PLACE -->\n```\n")
    assert wrong_figures(page) == []


def test_a_second_run_is_compared_figure_by_figure(results):
    def slower(point, by):
        timing = point.measured.timing
        return replace(point, measured=replace(point.measured, timing=replace(timing, ms=timing.ms * by)))

    same = comparison(results, results)
    assert not any(row[-1] for row in same.rows) and same.note.startswith(f"0 of {len(same.rows)} are marked")
    points = list(results.points)
    at = {p.task.series: i for i, p in enumerate(points) if p.task.what == "decode" and p.task.context == 32}
    for name in ("linear", "teacher, published style"):
        points[at[name]] = slower(points[at[name]], 1.1)
    points[at["hybrid"]] = replace(points[at["hybrid"]], measured=None, oom=True)
    rows = [row for row in comparison(results, replace(results, points=tuple(points))).rows if row[-1]]
    assert [row[0] for row in rows] == ["linear, decode, 32 tokens", "hybrid, decode, 32 tokens"]
    assert rows[0][1] == "ms" and rows[0][-2:] == ["+10.0", "over 5 %"]
    assert rows[1][2:4] == ["measured", "out of memory"]


def test_a_page_has_what_a_second_run_differs_by(page, made):
    found = json.loads(made.read_text())
    point = next(one for one in found["points"] if one["task"]["what"] == "decode")
    point["measured"]["timing"]["ms"] *= 2
    (page.parent / "second.json").write_text(json.dumps(found))
    page.write_text(BLOCK.format("second-run, machine", " beside second.json"))
    fill(page)
    text = page.read_text()
    assert "+100.0" in text and text.count("over 5 %") + text.count("over 20 %") == 1 and "1 of " in text
    page.write_text(BLOCK.format("second-run", " beside run.json"))
    fill(page)
    assert "0 of " in page.read_text() and "over" not in page.read_text()
    page.write_text(BLOCK.format("second-run", ""))
    with pytest.raises(UserError, match=":1: a report has no 'second-run'; it has protocol"):
        filled(page)


def test_the_verb_does_both_and_measures_nothing(page, made, capsys):
    words = ["bench", "--compare", str(made), str(page.parent / "run.json"), "--into", str(page)]
    page.write_text(f"98765<!-- from run.json: linear.decode.32.ms -->\n\n{BLOCK.format('growth', '')}\n")
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert "| linear, decode, 8 tokens | ms |" in shown.out and f"{page}:1: says 98765, but" in shown.out
    assert "1 figures of the pages differ from their results" in shown.err
    assert "### Growth with the context" in page.read_text()
    page.write_text("")
    assert cli.main(words) == 0
