"""From results to Markdown and plots, and into pages: numbers by hand, blocks, and that committed pages are true."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import made_up
import pytest

from mmmamba.ablation.journal import Result, Results, read
from mmmamba.ablation.plan import Cell
from mmmamba.ablation.plots import dots
from mmmamba.ablation.report import blocks, filled
from mmmamba.ablation.tables import Measured, markdown
from mmmamba.config_files import to_dict
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.errors import UserError
from mmmamba.report.plot_style import render

DOCS = Path(__file__).resolve().parents[2] / "docs"
WITH_BLOCKS = [page for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


def results(*cells: Result, **changes: object) -> Results:
    return Results(cells=cells or tuple(made_up.three_seeds()), plan=made_up.plan(**changes))


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_a_table_by_hand() -> None:
    text = markdown(results(), "rotation", image="r.svg")
    head, teacher, rope, none = rows(text)
    assert head == ["cell", "changed", "seeds", "loss", "mean", "easy", "read", "recall-4x", "against rope",
                    "paper: MME"]  # fmt: skip
    assert teacher == ["*teacher, % right*", "", "", "", "50.0", "50.0", "50.0", "50.0", "", ""]
    # rope: 90, 92, 94: s = 2, half = 4.3027 · 2 / √3 = 4.97. none: 80, 83, 83: s = √3, half = 4.30.
    assert rope == ["`rope`", "–", "3", "0.25", "92.0 ± 5.0", "92.0", "92.0", "50.0 ± 0.0", "–", r"1 \| 2"]
    # Differences −10, −9, −11: s = 1, half = 2.48.
    assert none == ["`none`", "`base: nano-hybrid`, `mixer.rope=false`", "3", "0.25", "82.0 ± 4.3", "80.0", "84.0",
                    "62.0 ± 5.0", "-10.0 [-12.5, -7.5]", "–"]  # fmt: skip
    assert "`rope` keeps more than `none` (the paper): **confirmed** (+10.0 [+7.5, +12.5] points)" in text
    assert "in recall-4x (nobody): **confirmed** (+12.0 [+7.0, +17.0] points)" in text
    assert "20 × 128 + 40 × 128 + 2,000 × 64 steps" in text and "t is 4.30 for 3 seeds" in text
    assert "50 unseen questions an ability" in text and "![Does rotation help?](r.svg)" in text
    assert "mmmamba distill x --set seed=0\n" in text and "seed=1" not in text


def test_words_stand_in_for_keys_that_would_fill_a_page() -> None:
    table = to_dict(made_up.plan().tables["rotation"])
    table["cells"]["none"]["about"] = "no rotation"
    table |= {"set": {"stage3.lr": 1e-3}, "setting": "a rate of ours"}
    said = markdown(results(tables={"rotation": table}), "rotation")
    assert rows(said)[3][1] == "no rotation" and "Changes to `nano-linear` with a rate of ours; " in said
    assert "stage3.lr" not in said


def test_what_is_missing_is_said() -> None:
    nothing = Results(plan=made_up.plan())
    assert "Not measured yet." in markdown(nothing, "rotation")
    one = results(made_up.result("rope", 0, 0.9, 0.9, None))
    _, _, rope, none = rows(markdown(one, "rotation"))
    assert rope[2:8] == ["1", "0.25", "90.0", "90.0", "90.0", "–"], "a single seed has no interval"
    assert none[2:8] == ["0", "–", "–", "–", "–", "–"]
    assert "**not measured**" in markdown(one, "rotation") and "no interval" in markdown(one, "rotation")
    with pytest.raises(UserError, match="the plan has no table 'rope'; known: rotation"):
        markdown(one, "rope")
    with pytest.raises(UserError, match="no line with their plan"):
        markdown(Results(), "rotation")


def test_an_ability_that_the_teacher_lacks_is_left_out_of_the_mean() -> None:
    lacking = made_up.result("rope", 0, 0.9, 0.7, 0.5)
    zero = made_up.result("rope", 0, 0.9, 0.7, None).abilities["recall-4x"]
    found = results(Result(**{**vars(lacking), "abilities": {**lacking.abilities, "read": zero}}))
    assert Measured.of(found, "rotation").retention("rope") == {0: pytest.approx(90.0)}


def test_steps_that_differ_get_a_column() -> None:
    found = results(made_up.result("rope", 0, 1, 1, 1), made_up.result("none", 0, 1, 1, 1, steps=(0, 0, 2600)))
    head, _, rope, none = rows(markdown(found, "rotation"))
    assert head[2] == "steps" and (rope[2], none[2]) == ("20 + 40 + 2,000", "0 + 0 + 2,600")


def test_a_plot_shows_every_cell_that_is_measured() -> None:
    figure = dots(Measured.of(results(), "rotation"))
    mean, beside = figure.axes
    assert [label.get_text() for label in mean.get_yticklabels()] == ["rope", "none"]
    spans = [line.get_xdata() for line in mean.get_lines() if len(line.get_xdata()) == 2 and line.get_linewidth() == 2]
    assert spans[0] == pytest.approx([92 - 4.968, 92 + 4.968], abs=0.01)
    assert [text.get_text() for text in beside.get_legend().get_texts()] == ["recall-4x"]
    assert render(figure, "svg") == render(dots(Measured.of(results(), "rotation")), "svg")
    assert render(figure, "png").startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- pages


@pytest.fixture
def page(tmp_path: Path) -> Path:
    made_up.journal(tmp_path / "made-up.jsonl")
    file = tmp_path / "page.md"
    file.write_text("# Before\n\n<!-- ablation: rotation of made-up.jsonl -->\nold\n<!-- /ablation -->\n\nAfter\n")
    return file


def test_a_block_is_made_anew_and_nothing_else(page: Path) -> None:
    text = filled(page)
    assert text.startswith("# Before\n\n<!-- ablation: rotation of made-up.jsonl -->\n\n**Does rotation help?**\n")
    assert text.endswith("</details>\n\n<!-- /ablation -->\n\nAfter\n") and "old" not in text
    assert "](made-up-rotation.svg)" in text
    page.write_text(text)
    assert filled(page) == text, "a second time changes nothing"
    page.write_text(text.replace("92.0 ± 5.0", "99.0 ± 0.1"))
    assert filled(page) == text, "a number changed by hand does not stay"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- ablation: rotation of made-up.jsonl -->\n", r"page.md:1: the block that begins here has no end"),
        ("\n<!-- /ablation -->\n", r"page.md:2: a block ends here that never began"),
        ("<!-- ablation rotation -->\n", r"page.md:1: a block begins with <!-- ablation: TABLE of FILE.jsonl -->"),
        (
            "<!-- ablation: a of b -->\n<!-- ablation: a of b -->\n",
            r"page.md:2: a block begins inside the one of line 1",
        ),
        ("<!-- ablation: a of gone.jsonl -->\n<!-- /ablation -->\n", r"page.md:1: there is no .*gone.jsonl"),
        (
            "\n<!-- ablation: rope of made-up.jsonl -->\n<!-- /ablation -->\n",
            r"page.md:2: the plan has no table 'rope'",
        ),
    ],
)
def test_a_wrong_mark_is_named(page: Path, text: str, message: str) -> None:
    page.write_text(text)
    with pytest.raises(UserError, match=message):
        filled(page)


def test_blocks_are_found_with_their_lines(page: Path) -> None:
    (block,) = blocks(page)
    assert (block.line, block.parts, block.file) == (3, ("rotation",), "made-up.jsonl")
    page.write_text("```\n<!-- ablation: x of y -->\n```\n" + filled(page))
    assert [block.line for block in blocks(page)] == [6], "an example in a fence is none"
    assert filled(page) == page.read_text()
    with pytest.raises(UserError, match="no such file"):
        blocks(page.parent / "gone.md")


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_pages_say_what_their_results_say(page: Path) -> None:
    """`mmmamba ablate TABLE --report --into PAGE` was run after the results changed; so were the plots."""
    assert filled(page) == page.read_text(encoding="utf-8"), f"{page} is not what its results give"
    for image in re.findall(r"\]\((\S+\.svg)\)", filled(page)):
        assert (page.parent / image).is_file(), image


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*-ablation.jsonl")), ids=lambda file: file.stem)
def test_the_commands_beside_a_result_repeat_it(file: Path) -> None:
    """The recipes that a committed result names still are what it was made with; `--report` writes them anew."""
    found = read(file)
    assert found.plan is not None and found.cells
    for result in found.cells:
        distil, base, *options = shlex.split(result.commands[0])[1:]
        changes = tuple(value for option, value in pairwise(options) if option == "--set")
        assert (distil, base, changes) == ("distill", result.base, result.set)
        recipe = load_recipe(DistillRecipe, base, changes)
        cell = Cell(table=result.table, name=result.cell, seed=result.seed, base=base, set=changes, recipe=recipe,
                    questions=found.plan.questions)  # fmt: skip
        assert cell.id == result.id, f"{result.commands[0]} makes something else now"
        assert result.commands == result.of(cell).commands
