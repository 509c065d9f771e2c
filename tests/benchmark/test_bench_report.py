"""Tables and plots say what was measured: ratios, gaps, the paper's points, the same in every form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmmamba.benchmark.clock import timing
from mmmamba.benchmark.limits import Rates
from mmmamba.benchmark.machine import commit
from mmmamba.benchmark.measure import Measured, prompt
from mmmamba.benchmark.paper import CONTEXT, POINTS, same_size
from mmmamba.benchmark.plots import PLOTS, draw, short
from mmmamba.benchmark.report import markdown, write_report
from mmmamba.benchmark.results import Point, Results, Task
from mmmamba.benchmark.subjects import random_subjects, series_of
from mmmamba.benchmark.tables import claim, number, tables
from mmmamba.config import from_dict, to_dict
from mmmamba.figures import render
from mmmamba.model.geometries import GEOMETRIES

CONTEXTS = (1024, CONTEXT, 2**20)


def measured(ms: float, gigabytes: float, batch: int = 1) -> Measured:
    return Measured(
        timing=timing([ms], [2 * ms]),
        tokens_per_s=batch / ms * 1e3,
        batch=batch,
        state_bytes=10**6,
        resident_bytes=10**9,
        peak_bytes=int(gigabytes * 1e9),
        bytes=3e9,
        flops=1e9,
        graph=True,
    )


@pytest.fixture
def results() -> Results:
    """Of the paper's size: the teacher takes a millisecond a thousand tokens, and does not fit with a million."""
    subjects = random_subjects("hovle-2.6b")
    points = []
    for one in series_of(subjects):
        for context in CONTEXTS:
            teacher, full = one.kind == "teacher", one.kind == "teacher" and context == 2**20
            found = measured(context / 1e3, 20.0) if teacher else measured(5.0, 5.0)
            task = Task(series=one.label, what="decode", context=context)
            points.append(Point(task=task, measured=None if full else found, oom=full))
            if one.style == "engine":
                many = Task(series=one.label, what="batch", variant="cache" if teacher else "float32", context=context)
                points.append(Point(task=many, measured=None if full else measured(10.0, 70.0, 100), oom=full))
                reads = Task(series=one.label, what="prefill", variant="text", context=context)
                late = Point(task=reads, skipped="would take about 900 s")
                points.append(late if full else Point(task=reads, measured=measured(100.0, 9.0)))
    return Results(
        request={"models": [], "geometry": "hovle-2.6b", "contexts": list(CONTEXTS)},
        environment={"device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": "abc", "weights": "bfloat16"},
        series=tuple(series_of(subjects)),
        paper=same_size(subjects[0].config),
        rates=Rates(bytes=3e12, flops=7e14),
        points=tuple(points),
        complete=True,
    )


def test_the_claim_is_made_at_the_papers_context_against_every_teacher(results):
    table = claim(results)
    assert table.title == "The claim, behind 103,424 tokens"
    assert [row[0] for row in table.rows] == ["linear", "hybrid"]
    assert list(table.rows[0]) == ["linear", "5", "5", *["20.7", "−75.0 %"] * 3]
    assert "20.6 and −75.8 %" in table.note


def test_gaps_are_shown(results):
    page = markdown(results)
    latency = next(table for table in tables(results) if table.title == "Next-token latency, ms")
    assert [row[-1] for row in latency.rows] == [*["out of memory"] * 3, "5", "5"]
    assert "teacher, prefill (text), 1,048,576 tokens: would take about 900 s" in page
    assert (
        "| HoVLE, FlashAttention-2 | 143 | 21.69 |" in page
        and "RTX 4090" in page
        and "torch 2.11, triton 3.6, commit abc" in page
    )


def test_figures_have_the_papers_points_and_the_crosses(results):
    labels = {text.get_text() for text in draw(results, "latency").axes[0].get_legend().get_texts()}
    assert {f"the paper's {point.kind} (RTX 4090)" for point in POINTS} <= labels
    assert {"out of memory", "linear", "teacher, published style, mask"} <= labels
    crosses = [
        line for line in draw(results, "latency").axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())
    ]
    assert [line.get_xdata()[0] for line in crosses] == [2**20] * 3
    axis = draw(results, "throughput").axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    other = replace(results, paper=False)
    assert not any("paper" in text.get_text() for text in draw(other, "memory").axes[0].get_legend().get_texts())


@pytest.mark.parametrize("name", PLOTS)
def test_the_same_results_give_the_same_files(results, name):
    for theme in ("light", "dark"):
        assert render(draw(results, name, theme), "svg") == render(draw(results, name, theme), "svg")


def test_nothing_measured_is_a_report_too(results, tmp_path):
    empty = replace(results, points=tuple(Point(task=point.task, oom=True) for point in results.points))
    assert draw(empty, "latency") is None
    write_report(empty, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_results_come_back_from_their_file(results):
    assert from_dict(Results, to_dict(results)) == results


def test_the_papers_points():
    ratios = {point.kind: (POINTS[0].ms / point.ms, 1 - point.gigabytes / POINTS[0].gigabytes) for point in POINTS}
    assert ratios["linear"] == pytest.approx((20.6, 0.758), abs=0.06)
    assert ratios["hybrid"] == pytest.approx((13.5, 0.602), abs=0.06)
    assert same_size(GEOMETRIES["hovle-2.6b"]) and not same_size(GEOMETRIES["nano"])


def test_a_prompt_of_pictures_has_whole_tiles(tiny_config):
    config = tiny_config()
    made = prompt(config, 21, images=True)
    assert (made.input_ids == config.img_context_token_id).sum() == 20 and len(made.tiles) == 5
    assert not (prompt(config, 5000).input_ids == config.img_context_token_id).any()


def test_numbers_and_names():
    assert [number(value) for value in (0.01234, 6.94, 142.65, 28_987.3)] == ["0.0123", "6.94", "143", "28,987"]
    assert [short(tokens) for tokens in (512, 1024, 2**20, CONTEXT)] == ["512", "1k", "1m", "103,424"]


def test_what_is_no_checkout_has_no_commit(tmp_path):
    assert commit(tmp_path) == ""
