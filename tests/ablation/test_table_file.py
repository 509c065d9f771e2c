"""Table files: what they become, that a cell's identity is its content, and what is said of a mistake in one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up import plan_data

from mmmamba import cli
from mmmamba.ablation.plan import Cell, Plan, aligned, cells_of, flow, load_plan, overlaid, select
from mmmamba.config_files import from_dict
from mmmamba.distill.recipe import DistillRecipe, load_recipe
from mmmamba.errors import UserError


def cells(**changes: Any) -> list[Cell]:
    return cells_of(from_dict(Plan, plan_data("hovle-2.6b-linear", **changes)), "tiny.yaml")


def cell(name: str, seed: int = 0, **changes: Any) -> Cell:
    return next(found for found in cells(**changes) if f"{found.table}/{found.name}" == name and found.seed == seed)


def test_a_cell_lays_its_changes_over_its_tables_over_the_plans() -> None:
    found = cell("stages/only-3", 1, set={"stage3.lr": 1e-4, "stage3.clip": 1.0},
                 tables__stages__base="hovle-2.6b-hybrid",
                 tables__stages__set={"mixer.rope": False, "stage3.lr": 2e-4})  # fmt: skip
    assert (found.base, found.recipe.layers, found.recipe.mixer.rope) == ("hovle-2.6b-hybrid", "measured:4", False)
    assert (found.recipe.stage3.lr, found.recipe.stage3.clip, found.recipe.seed) == (2e-4, 1.0, 1)
    assert found.steps == (0, 0, 20_000)
    whole = cell("layers/two", tables__layers__set={"mixer": {"qk_norm": True}}, set={"mixer.rope": False})
    assert whole.recipe.mixer.qk_norm and not whole.recipe.mixer.rope and whole.recipe.mixer.conv_activation == "silu"


def test_a_cell_may_start_from_another_recipe() -> None:
    found = cell("layers/two", tables__layers__cells={"two": {"base": "nano-linear-paper", "stage1.steps": 7}})
    assert found.recipe == load_recipe(DistillRecipe, "nano-linear-paper", ["stage1.steps=7"])


def test_words_about_a_cell_change_nothing() -> None:
    plain, said = (cell("layers/two", tables__layers__cells={"two": {"layers": [0, 3], **words}})
                   for words in ({}, {"about": "two of them"}))  # fmt: skip
    assert (said.recipe, said.set, said.id) == (plain.recipe, plain.set, plain.id)


def test_steps_are_scaled_and_none_is_lost() -> None:
    plan = from_dict(Plan, plan_data("hovle-2.6b-linear"))
    scaled = {str(found): found.steps for found in cells_of(plan, "x", steps_scale=0.00001)}
    assert scaled["stages/all, seed 0"] == (1, 1, 1)
    assert scaled["stages/only-3, seed 1"] == (0, 0, 1)


def test_an_identity_is_what_decides_the_result() -> None:
    one = cell("stages/all")
    assert one.id == cell("layers/none").id, "the same under another name"
    assert one.id == cell("stages/all", set={"data.workers": 3}).id, "workers change no row"
    different = [
        cell("stages/all", 1),
        cell("stages/only-3"),
        cell("stages/all", set={"stage3.lr": 1e-5}),
        cell("stages/all", questions__limit=3),
        cell("stages/all", set={"data.root": "elsewhere"}),
    ]
    assert len({one.id, *(other.id for other in different)}) == 6


def test_a_default_that_is_spelt_out_changes_no_identity() -> None:
    """So that a key that recipes get one day leaves finished cells finished."""
    spelt = {"stage3.temperature": 1.0, "mixer.qk_norm": False, "mixer.dt_min": 0.001, "data.on_bad_sample": "stop"}
    one, other = cell("stages/all"), cell("stages/all", set=spelt)
    assert (one.id, one.alignment) == (other.id, other.alignment) and one.set != other.set


def test_an_alignment_is_what_decides_stages_1_and_2() -> None:
    one = cell("stages/all")
    assert one.alignment == cell("layers/two").alignment == cell("stages/all", set={"stage3.steps": 5}).alignment
    after = {"stage4": {"train": ["conv"], "steps": 5, "batch_size": 1, "lr": 1.0}}
    assert one.alignment == cell("stages/all", set=after).alignment
    assert one.alignment == cell("stages/all", set={"stage3.train": ["conv", "mlp"]}).alignment
    others = [cell("stages/all", 1), cell("stages/only-3"), cell("stages/all", set={"mixer.rope": True}),
              cell("stages/all", set={"init": "inherit"})]  # fmt: skip
    assert len({one.alignment, *(other.alignment for other in others)}) == 5


def test_a_fourth_stage_counts() -> None:
    after = {"stage4": {"train": ["conv"], "steps": 50, "batch_size": 3, "lr": 1.0}}
    found = cell("stages/only-3", set=after)
    assert (found.steps, found.batch_sizes, found.aligning) == ((0, 0, 20_000, 50), (128, 128, 64, 3), 0)
    assert found.id != cell("stages/only-3").id and aligned(found).recipe.stage4 is None
    plan = from_dict(Plan, plan_data("hovle-2.6b-linear", set=after))
    scaled = {str(found): found.steps for found in cells_of(plan, "x", steps_scale=0.01)}
    assert scaled["stages/only-3, seed 0"] == (0, 0, 200, 1)


def test_what_is_aligned_for_a_group_is_the_same_whichever_cell_asks() -> None:
    asks = [cell("stages/all"), cell("layers/two"), cell("stages/all", set={"stage3.lr": 1.0}),
            cell("stages/all", tables__stages__base="hovle-2.6b-hybrid")]  # fmt: skip
    recipes = [aligned(found).recipe for found in asks]
    assert recipes[0].stage3.steps == 0 and recipes[0].layers == "linear"
    assert recipes[0].stage1 == asks[0].recipe.stage1 and recipes[0].stage2 == asks[0].recipe.stage2
    assert all(recipe == recipes[0] for recipe in recipes)
    first = aligned(asks[1])
    assert load_recipe(DistillRecipe, first.base, first.set) == recipes[0]


def test_the_printed_commands_make_the_same_run_and_ask_the_same(tmp_path: Path) -> None:
    table = {"layers": {"title": "x", "cells": {"two": {"layers": [0, 3], "stage3.lr_scale": {"A_log": 0.1}}}}}
    found = cell("layers/two", 1, tables=table)
    distil, ask = (shlex.split(command) for command in found.commands("cuda"))
    given = cli.parse(distil[1:]).keywords
    assert load_recipe(DistillRecipe, given["recipe"], given["set"]) == found.recipe
    assert given["device"] == "cuda"
    asked = cli.parse(ask[1:]).keywords
    assert asked["model"] == f"{given['out']}/model" and asked["against"] == "HoVLE"
    assert asked["abilities"] == found.questions.abilities and asked["data_dir"] == Path("data/sft")
    assert (asked["limit"], asked["max_new_tokens"], asked["seed"], asked["blind"]) == (2, 3, 0, False)


@pytest.mark.parametrize("value", [1, 1e-5, "measured:4", "linear", [0, 3], {"A_log": 0.1}, None, "", "a: b", [], {}])
def test_a_value_survives_the_command_line(value: Any) -> None:
    assert yaml.safe_load(flow(value)) == value
    assert "\n" not in flow(value)


def test_set_changes_what_no_cell_changes_itself() -> None:
    plan = overlaid(from_dict(Plan, plan_data("hovle-2.6b-linear")), ["stage1.steps=5", "stage3.lr=1e-4"])
    found = {str(each): each.recipe for each in cells_of(plan, "x")}
    assert found["stages/all, seed 0"].stage1.steps == 5 and found["stages/only-3, seed 0"].stage1.steps == 0
    assert {recipe.stage3.lr for recipe in found.values()} == {1e-4}
    for wrong in ("stage3.lr", "=1"):
        with pytest.raises(UserError, match=r"--set: .*must read key.path=value"):
            overlaid(plan, [wrong])


def test_cells_are_picked_by_table_name_and_seed() -> None:
    every = cells()
    assert select(every, (), ()) == every
    assert [str(found) for found in select(every, ("stages/all", "layers"), (1,))] == [
        "stages/all, seed 1", "layers/none, seed 1", "layers/two, seed 1",
    ]  # fmt: skip
    for only, seeds, message in (
        (("stage",), (), "--only stage: there is no such cell; known: stages, layers"),
        (("stages/none",), (), "--only stages/none: there is no such cell; known: stages/all, stages/only-3"),
        ((), (7,), "--seeds 7: no cell has it; known: 0, 1"),
    ):
        with pytest.raises(UserError, match=message):
            select(every, only, seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables__stages__cells": {"a": {"mixer.ropee": True}}, "tables__stages__reference": "a"},
         r"tiny.yaml: 'tables.stages': claims: no cell 'all', must be among a"),
        ({"tables__layers__cells": {"a": {"mixer.ropee": True}}},
         r"tiny.yaml: tables.layers.cells.a: .*unknown key 'mixer.ropee' \(did you mean 'rope'\?\)"),
        ({"tables__layers__cells": {"a": {"stage3.lr": "fast"}}}, r"cells.a: .*'stage3.lr' must be a number"),
        ({"tables__layers__cells": {"a": {"layers": "measred:4"}}}, r"cells.a: .*layers must be 'linear', 'hybrid:K'"),
        ({"tables__layers__cells": {"a": {"seed": 3}}}, r"cells.a: 'seed' is not to be changed: the key 'seeds'"),
        ({"tables__layers__cells": {"a": {"base": "nano-lniear"}}}, r"cells.a: nano-lniear: no such recipe file"),
        ({"tables__layers__cells": {"a/b": {}}}, r"'tables.layers': the name 'a/b' of a cell may hold letters"),
        ({"tables__layers__cells": {}}, r"'tables.layers': there is no cell"),
        ({"tables__layers__refrence": "none"}, r"unknown key 'tables.layers.refrence' \(did you mean 'reference'\?\)"),
        ({"tables__stages__claims": [{"better": "all", "worse": "only-3", "ability": "count"}]},
         r"tables.stages.claims: 'count' is neither 'mean' nor an ability that is asked"),
        ({"questions__abilities": ["raed"]}, r"'questions': abilities: unknown ability 'raed'"),
        ({"questions__mean": ["count"]}, r"'questions': mean: unknown ability 'count', must be among easy, read"),
        ({"seeds": [0, 0]}, r"seeds names a seed twice"),
        ({"seeds": []}, r"seeds is empty"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(plan_data("hovle-2.6b-linear", **changes)))
    with pytest.raises(UserError, match=message) as said:
        cells_of(*load_plan(file))
    assert str(file) in str(said.value) and "\n" not in str(said.value)


def test_two_cells_of_one_name_and_a_recipe_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    text = "name: x\nbase: nano-linear\ntables:\n  t:\n    title: x\n    cells:\n      a: {}\n      a: {seed: 1}\n"
    file.write_text(text)
    with pytest.raises(UserError, match=r"t.yaml:8: the key 'a' appears here again \(first on line 7\)"):
        load_plan(file)
    with pytest.raises(UserError, match=r"nano-linear.yaml: has no 'tables': it is a recipe"):
        load_plan("nano-linear")


def test_the_shipped_table_is_sound() -> None:
    plan, where = load_plan("nano-ablation")
    found = cells_of(plan, where)
    assert {"stages", "softmax-layers", "placement"} <= set(plan.tables)
    for each in found:
        kept = each.recipe.layer_map(8).count("attention")
        assert 0 <= kept < 8, str(each)
    for name, table in plan.tables.items():
        if table.reference:
            mine = {each.id: each.name for each in found if each.table == name and each.seed == 0}
            assert len(mine) == len(table.cells), f"{name}: two cells ask for the same"
    short = [each for each in found if each.table not in ("recipes", "optimizer")]
    assert all(each.steps[2] <= 2600 for each in short), "a cell takes less than a minute on a GPU"
    seeds = {name: {each.seed for each in found if each.table == name} for name in plan.tables}
    papers = {"recipes", "stages", "initialisation", "softmax-layers", "placement"}
    assert all(seeds[name] == ({0, 1, 2} if name in papers else {0}) for name in plan.tables)
