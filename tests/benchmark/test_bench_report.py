"""Tables and plots say what was measured: ratios, gaps, the paper's points, the same in every form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmmamba.benchmark.claims import CONTEXT, POINTS, growth, optimised, protocol, same_size
from mmmamba.benchmark.limits import Rates
from mmmamba.benchmark.measure import Measured, prompt
from mmmamba.benchmark.plots import PLOTS, draw, short
from mmmamba.benchmark.report import markdown, write_report
from mmmamba.benchmark.results import Point, Results, Task
from mmmamba.benchmark.subjects import random_subjects, series_of
from mmmamba.benchmark.tables import tables
from mmmamba.benchmark.timing import timing
from mmmamba.config_files import from_dict, to_dict
from mmmamba.model.geometries import GEOMETRIES
from mmmamba.report.environment import commit
from mmmamba.report.plot_style import render

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
            int8 = one.style == "int8"
            found = measured(context / 1e3, 20.0) if teacher else measured(5.0, 5.0)
            if int8:
                found = measured(found.timing.ms / 2, 20.0 if teacher else 7.0)
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


def test_the_papers_protocol_is_against_both_callings_with_the_papers_own_points_marked(results):
    table = protocol(results)
    assert table.title == "The paper's protocol, after a context of 103,424 tokens"
    assert list(table.columns[3:]) == [
        "× teacher, published style", "memory", "× teacher, published style, mask", "memory",
    ]  # fmt: skip
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["teacher, published style, mask"] == ["103", "20", *["–"] * 4]
    assert rows["linear"] == rows["hybrid"] == ["5", "5", *["20.7", "−75.0 %"] * 2]
    assert rows["linear, int8 weights"] == ["2.5", "7", *["41.4", "−65.0 %"] * 2]
    assert rows["the paper's mmMamba-linear (RTX 4090)"] == ["6.94", "5.22", *["20.6", "−75.9 %"] * 2]
    assert "teacher" not in rows and len(protocol(replace(results, paper=False)).rows) == len(rows) - len(POINTS)


def test_the_optimised_teacher_must_be_good_for_a_ratio_to_count(results):
    table = optimised(results)
    assert list(table.columns) == ["", "teacher", "linear", "×", "hybrid", "×"]
    on_the_machine = replace(results, environment={**results.environment, "device": "NVIDIA H100 80GB HBM3"})
    table = optimised(on_the_machine)
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["ms a token"] == ["103", "≤ 7: NOT REACHED", *["5", "20.7"] * 2]
    assert rows["ms a token, int8 weights in both"] == ["51.7", "–", *["2.5", "20.7"] * 2]
    assert rows["ms to the first token, text"] == ["100", "≤ 3,300: reached", *["100", "1.00"] * 2]
    states = "tokens/s at the greatest batch, SSM states in "
    assert rows[states + "float32"] == ["10,000", "≥ 195: reached", *["10,000", "1.00"] * 2]
    assert states + "bfloat16" not in rows  # not asked for here


def test_growth_says_how_flat_a_line_is_and_where_it_ends(results):
    rows = {row[0]: list(row[1:]) for row in growth(results).rows}
    assert rows["linear"] == ["1,024", "1,048,576", "5–5", "0.0 %", "5–5", "0.0 %", "–"]
    assert rows["teacher"] == ["1,024", "103,424", "1.02–103", "10,000.0 %", "20–20", "0.0 %", "1,048,576"]


def test_gaps_are_shown(results):
    page = markdown(results)
    latency = next(table for table in tables(results) if table.title == "Next-token latency, ms")
    assert [row[-1] for row in latency.rows] == [*["out of memory"] * 4, "5", "2.5", "5", "2.5"]
    assert "teacher, prefill (text), 1,048,576 tokens: would take about 900 s" in page
    assert (
        "| the paper's HoVLE, FlashAttention-2 (RTX 4090) | 143 | 21.69 |" in page
        and "RTX 4090" in page
        and "torch 2.11, triton 3.6, commit abc" in page
    )


def test_figures_have_the_papers_points_and_the_crosses(results):
    labels = {text.get_text() for text in draw(results, "latency").axes[0].get_legend().get_texts()}
    assert {f"the paper's {point.kind} (RTX 4090)" for point in POINTS} <= labels
    assert {"out of memory", "linear", "linear, int8 weights", "teacher, published style, mask"} <= labels
    crosses = [
        line for line in draw(results, "latency").axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())
    ]
    assert [line.get_xdata()[0] for line in crosses] == [2**20] * 4
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mmmamba.json", "report.html", "report.md"]


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


def test_contexts_in_short():
    assert [short(tokens) for tokens in (512, 1024, 2**20, CONTEXT)] == ["512", "1k", "1m", "103,424"]


def test_what_is_no_checkout_has_no_commit(tmp_path):
    assert commit(tmp_path) == ""
