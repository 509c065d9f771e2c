"""The results file: lines that survive, lines that are refused, files that are joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up
import pytest

from mmmamba.ablation.journal import Journal, Result, merge, of_table, read
from mmmamba.ablation.plan import Cell, Plan, cells_of
from mmmamba.config_files import from_dict, to_dict
from mmmamba.errors import UserError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with a plan and six results."""
    return made_up.journal(tmp_path / "results.jsonl").path


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_what_is_written_is_read(written: Path) -> None:
    found = read(written)
    assert found.cells == tuple(made_up.three_seeds()) and found.plan == made_up.plan()
    journal = Journal(written)
    assert journal.results == found
    journal.note_plan(made_up.plan(), 1.0)
    assert len(lines(written)) == 7, "the same plan is written once"
    journal.note_plan(made_up.plan(seeds=[4]), 0.5)
    assert (read(written).plan, read(written).steps_scale) == (made_up.plan(seeds=[4]), 0.5)


def test_half_a_last_line_is_left_out_and_what_follows_is_whole(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole + lines(written)[-1].encode()[:50])
    assert len(read(written).cells) == 6
    assert f"{written}:8: the incomplete last line of a killed run is left out" in capsys.readouterr().err
    assert written.read_bytes() != whole, "reading changes nothing"
    Journal(written).add(made_up.result("rope", 9, 1, 1, 1))
    assert [result.seed for result in read(written).cells][-1] == 9 and written.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"result": {"table"', r":3: not JSON: "),
        ("[]", r":3: holds neither 'plan' nor 'result'"),
        ('{"loss": 1}', r":3: holds neither 'plan' nor 'result'"),
        ({"seed": "zero"}, r":3: 'result.seed' must be int, got 'zero'"),
        ({"extra": 1}, r":3: unknown key 'result.extra'"),
        ({"abilities": {"read": {"n": 1}}}, r":3: missing required keys 'result.abilities.read.accuracy'"),
    ],
)
def test_a_broken_line_is_named(written: Path, broken: str | dict[str, Any], message: str) -> None:
    before = lines(written)
    if isinstance(broken, dict):
        broken = json.dumps({"result": {**to_dict(made_up.result("rope", 0, 1, 1, 1)), **broken}})
    written.write_text("\n".join([*before[:2], broken, *before[3:]]) + "\n")
    with pytest.raises(UserError, match=message) as said:
        read(written)
    assert str(written) in str(said.value)


def test_cells_are_found_by_name_and_content(written: Path) -> None:
    class Asked:  # as much of a Cell as is looked at
        table, name, seed, id = "rotation", "rope", 1, "id-of-rope-1"

    journal, asked = Journal(written), Asked()
    assert journal.find(asked) == made_up.three_seeds()[1]  # type: ignore[arg-type]
    asked.name = "other"
    assert journal.find(asked) is None  # type: ignore[arg-type]
    assert journal.same(asked) == made_up.three_seeds()[1]  # type: ignore[arg-type]
    asked.id = "changed"
    assert journal.same(asked) is None  # type: ignore[arg-type]


def test_a_run_gets_the_names_and_the_commands_that_it_has_now(tmp_path: Path) -> None:
    def cells(**changes: Any) -> list[Cell]:
        return cells_of(from_dict(Plan, made_up.plan_data("nano-linear", **changes)), "tiny.yaml")

    journal = Journal(tmp_path / "r.jsonl")
    before = cells()
    for number, cell in enumerate(before):
        if journal.same(cell) is None:
            journal.add(made_up.result("rope", cell.seed, number, 1, 1, id=cell.id).of(cell))
    other = made_up.result("rope", 0, 1, 1, 1, id="asked for no more")
    journal.add(other)
    written = journal.results.cells
    journal.rename(before)
    assert journal.results.cells == written, "all have the names that they had"
    two = next(cell for cell in before if cell.name == "two")

    # The same run by another way: what the cell changed before now stands in its table.
    after = cells(tables__layers={"title": "How?", "set": {"layers": [0, 3]}, "cells": {"both": {}}})
    journal.rename(after)
    assert read(journal.path) == journal.results
    found = {(r.table, r.cell, r.seed): r for r in journal.results.cells}
    assert ("layers", "two", 0) not in found, "its name is gone"
    assert other in found.values(), "nothing is lost"
    renamed = found["layers", "both", 0]
    assert renamed.id == two.id and renamed.commands == next(c for c in after if c.name == "both").commands("cuda")
    assert renamed.abilities["easy"].retention == before.index(two)


def test_files_are_joined_each_cell_once(written: Path, tmp_path: Path) -> None:
    other, third = Journal(tmp_path / "b.jsonl"), Journal(tmp_path / "c.jsonl")
    other.add(made_up.result("rope", 0, 0.1, 0.1, 0.1))  # measured there too: the first stays
    other.add(made_up.result("rope", 5, 0.9, 0.9, 0.9))
    third.add(made_up.result("rope", 5, 0.2, 0.2, 0.2))
    third.add(made_up.result("none", 5, 0.9, 0.9, 0.9))
    assert merge(written, [other.path, third.path]) == 2
    found = read(written)
    assert found.plan == made_up.plan()
    assert found.cells[:6] == tuple(made_up.three_seeds())
    assert [(r.cell, r.seed, r.abilities["easy"].retention) for r in found.cells[6:]] == [
        ("rope", 5, 0.9), ("none", 5, 0.9),
    ]  # fmt: skip
    assert merge(written, [other.path]) == 0
    with pytest.raises(UserError, match=r"--merge .*gone.jsonl: no such file"):
        merge(written, [tmp_path / "gone.jsonl"])


def test_the_last_line_of_a_cell_counts_and_other_scales_do_not(written: Path) -> None:
    journal = Journal(written)

    def kept() -> dict[int, float | None]:
        found: dict[int, Result] = of_table(journal.results, "rotation")["rope"]
        return {seed: result.abilities["easy"].retention for seed, result in found.items()}

    assert kept() == {0: 0.9, 1: pytest.approx(0.92), 2: pytest.approx(0.94)}
    journal.add(made_up.result("rope", 1, 0.5, 0.5, 0.5, id="of a later definition"))
    journal.add(made_up.result("rope", 2, 0.1, 0.1, 0.1, steps_scale=0.01))
    journal.add(made_up.result("gone", 2, 0.1, 0.1, 0.1))
    assert kept() == {0: 0.9, 1: 0.5, 2: pytest.approx(0.94)}
    assert list(of_table(journal.results, "rotation")) == ["rope", "none"]
