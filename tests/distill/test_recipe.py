"""Recipes: the shipped ones load strictly; a mistake in one names the key and the nearest right one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import small_run
from mmmamba.config_files import from_dict, load_yaml, to_dict
from mmmamba.distill.recipe import (
    RECIPES,
    DistillRecipe,
    TeachRecipe,
    find_recipe,
    load_recipe,
)
from mmmamba.distill.stages import STAGES
from mmmamba.distill.train_config import StageConfig, TrainConfig
from mmmamba.errors import UserError
from mmmamba.model.mixers import ATTENTION, MAMBA2, Mamba2Options

SHIPPED = sorted(path for path in RECIPES.glob("*.yaml") if "tables" not in load_yaml(path))  # which name cells


def kind_of(path: Path) -> type[DistillRecipe] | type[TeachRecipe]:
    return TeachRecipe if "train" in load_yaml(path) else DistillRecipe


def small(**changes) -> DistillRecipe:
    return from_dict(DistillRecipe, small_run.recipe(**changes), where="small.yaml")


def test_recipes_are_shipped():
    assert {kind_of(path) for path in SHIPPED} == {TeachRecipe, DistillRecipe}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_strictly_and_is_named_like_its_file(path):
    plan = load_recipe(kind_of(path), path.stem)
    assert plan.name == path.stem
    assert from_dict(kind_of(path), to_dict(plan), where="again") == plan
    if isinstance(plan, DistillRecipe):
        assert len(plan.layer_map(8)) == 8


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("family", ["pico", "hovle-2.6b"])
def test_linear_and_hybrid_of_a_family_differ_in_their_layers_alone(family, kind):
    """So that the hybrid can take stages 1 and 2 over from the linear run."""
    plan = load_recipe(DistillRecipe, f"{family}-{kind}")
    other = load_recipe(DistillRecipe, f"{family}-linear")
    for field in ("teacher", "mixer", "seed", "data", "stage1", "stage2"):
        assert getattr(plan, field) == getattr(other, field), field


def test_nanos_linear_and_hybrid_differ_in_their_mixer_too():
    linear, hybrid = (load_recipe(DistillRecipe, f"nano-{kind}") for kind in ("linear", "hybrid"))
    assert linear.mixer == Mamba2Options()
    assert hybrid.mixer == Mamba2Options(rope=True, conv_activation="none")
    assert replace(linear, name=hybrid.name, layers=hybrid.layers, mixer=hybrid.mixer) == hybrid


@pytest.mark.parametrize("path", [p for p in SHIPPED if p.stem.endswith("-paper")], ids=lambda path: path.stem)
def test_the_papers_recipes_follow_the_paper(path):
    plan = load_recipe(DistillRecipe, path)
    assert plan.mixer == Mamba2Options()
    new = {"A_log", "dt_bias", "dt_proj", "conv", "gate_proj", "norm"}
    inherited = {"q_proj", "k_proj", "v_proj"}
    assert [set(s.train) for s in (plan.stage1, plan.stage2)] == [new, new | inherited]
    assert set(plan.stage3.train) == (new | inherited) - {"A_log", "dt_bias"}
    for stage in (plan.stage1, plan.stage2, plan.stage3):
        assert (stage.clip, stage.prompt_weight, stage.supervised, stage.temperature) == (5.0, 1.0, 0.0, 1.0)
    assert plan.stage1.loss_scale == plan.stage2.loss_scale == 1000


def test_the_delta_rules_strength_is_trained_where_there_is_one():
    train = [*small_run.STAGE1, "beta_proj"]
    with pytest.raises(
        UserError, match=r"stage1.train: a mamba2 mixer with these options has no 'beta_proj', it has A_log,"
    ):
        small(stage1__train=train)
    plan = small(stage1__train=train, mixer={"rule": "gated_delta", "qk_norm": True})
    assert plan.mixer.rule == "gated_delta" and "beta_proj" in plan.stage1.train


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_the_papers_recipes_at_its_size_have_its_numbers(kind):
    plan = load_recipe(DistillRecipe, f"hovle-2.6b-{kind}-paper")
    stages = (plan.stage1, plan.stage2, plan.stage3)
    assert [(s.steps, s.batch_size, s.lr) for s in stages] == [
        (20_000, 128, 1e-3), (20_000, 128, 5e-4), (20_000, 64, 5e-5),
    ]  # fmt: skip
    for stage in stages:
        assert (stage.warmup, stage.decay, stage.weight_decay, stage.betas) == (0.1, 0.1, 0.05, (0.9, 0.999))
        assert stage.micro_tokens == plan.data.max_length == 8192
    assert (plan.teacher, plan.data.max_tiles) == ("HoVLE", 12)
    softmax = [i for i, kind in enumerate(plan.layer_map(32)) if kind == ATTENTION]
    assert softmax == ([] if kind == "linear" else list(range(0, 32, 4)))


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_our_recipes_at_its_size_have_nanos_stages_and_the_papers_mixer_and_samples(kind):
    plan, nano, paper = (load_recipe(DistillRecipe, name) for name in (
        f"hovle-2.6b-{kind}", f"nano-{kind}", f"hovle-2.6b-{kind}-paper",
    ))  # fmt: skip
    assert (plan.mixer, plan.layers) == (paper.mixer, nano.layers)
    for name in ("stage1", "stage2", "stage3"):
        ours, theirs, small = (getattr(one, name) for one in (plan, paper, nano))
        assert set(ours.train) == {*small.train} - {"o_proj", "mlp"} and ours.decay == small.decay
        assert (ours.steps, ours.batch_size) == (theirs.steps, theirs.batch_size)
    assert plan.stage3.lr == pytest.approx(nano.stage3.lr * 256 / 2048)


@pytest.mark.parametrize("mixer", [{}, {"rule": "gated_delta", "qk_norm": True}])
def test_what_a_stage_trains_by_default_is_what_our_recipes_train(mixer):
    recipe = small_run.recipe(mixer=mixer)
    for stage in ("stage1", "stage2", "stage3"):
        del recipe[stage]["train"]
    plan = from_dict(DistillRecipe, recipe, where="small.yaml")
    written = load_recipe(DistillRecipe, "pico-linear" if mixer else "nano-linear-paper")
    for stage in ("stage1", "stage2"):
        assert set(getattr(plan, stage).train) == set(getattr(written, stage).train)
    assert plan.stage3.train == plan.stage2.train
    assert set(small(mixer=mixer, stage3__train=["default", "mlp"]).stage3.train) == {*plan.stage2.train, "mlp"}
    assert from_dict(DistillRecipe, to_dict(plan), where="again") == plan  # a run folder's recipe names all parts


def test_the_table_of_stages_has_a_line_for_each_stage_of_a_recipe():
    assert list(STAGES) == list(small(stage4={"steps": 1, "batch_size": 1, "lr": 1.0}).stages)


# ---------------------------------------------------------------------------------------------- layer map


@pytest.mark.parametrize(
    ("layers", "softmax"),
    [("linear", []), ("hybrid:4", [0, 4]), ("hybrid:3", [0, 3, 6]), ("measured:4", [0, 4]), ([], []), ([2, 7], [2, 7])],
)
def test_layer_map(layers, softmax):
    layer_map = small(layers=layers).layer_map(8)
    assert [i for i, kind in enumerate(layer_map) if kind == ATTENTION] == list(softmax)
    assert set(layer_map) <= {ATTENTION, MAMBA2} and len(layer_map) == 8


@pytest.mark.parametrize(
    "layers", ["linar", "hybrid", "hybrid:", "hybrid:0", "hybrid:-1", "hybrid:x", "measured:0", "softmax:2"]
)
def test_a_wrong_layer_map_says_what_it_may_be(layers):
    with pytest.raises(
        UserError, match=r"recipe small: layers must be 'linear', 'hybrid:K', 'measured:K' or a list, got"
    ):
        small(layers=layers).layer_map(8)


@pytest.mark.parametrize("layer", [8, -1])
def test_a_layer_that_the_teacher_lacks_is_named(layer):
    with pytest.raises(UserError, match=rf"layers names layer {layer}, the teacher has 0…7"):
        small(layers=[0, layer]).layer_map(8)


@pytest.mark.parametrize("layers", ["hybrid:1", list(range(8))])
def test_something_must_be_left_to_distil(layers):
    with pytest.raises(UserError, match="layers keeps softmax in all 8 layers: nothing to distil"):
        small(layers=layers).layer_map(8)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage1__stepz": 3}, r"unknown key 'stage1.stepz' \(did you mean 'steps'\?\)"),
        ({"mixer": {"ropee": True}}, r"unknown key 'mixer.ropee' \(did you mean 'rope'\?\)"),
        ({"data__sources": [{"pth": "x"}]}, r"unknown key 'data.sources\[0\].pth' \(did you mean 'path'\?\)"),
        ({"techer": "x"}, r"unknown key 'techer' \(did you mean 'teacher'\?\)"),
        ({"seed": "abc"}, r"'seed' must be int, got 'abc' \(str\)"),
        ({"stage2__lr": "fast"}, r"'stage2.lr' must be a number, got 'fast' \(str\)"),
        ({"stage3__steps": 1.5}, r"'stage3.steps' must be int, got 1.5 \(float\)"),
        ({"stage3__reduction": "sum"}, r"'stage3.reduction' must be .*'mean'.*'published'.*, got 'sum'"),
        ({"stage1__train": ["vonc"]}, r"'stage1': train: unknown kind of parameter 'vonc', must be among A_log, "),
        ({"stage1__lr_scale": {"head": 2.0}}, r"'stage1': lr_scale: unknown kind of parameter 'head', must be among A"),
        ({"stage2__train": ["conv", "mlp"]}, r"yaml: stage2.train: 'mlp' learns nothing from a loss on the heads"),
        ({"stage4": {"steps": 1, "batch_size": 1}}, r"missing required key 'stage4.lr'"),
        ({"init": "mimick"}, r"'init' must be 'mimic' or 'inherit' or 'scratch', got 'mimick'"),
        ({"init": "scratch"}, r"init 'scratch' draws W_o too, and no stage trains it: add o_proj to stage3.train"),
        ({"init": "inherit", "mixer": {"decay": "spread"}}, r"init 'inherit' draws the decay as Mamba-2 does"),
        ({"stage1__warmup": 0.8, "stage1__decay": 0.8}, r"'stage1': warmup \+ decay is 1.6, must lie in \[0, 1\]"),
        ({"stage1__steps": -1}, r"'stage1': steps \(-1\) must be at least 0"),
        ({"stage1__log_every": 0}, r"'stage1': log_every must be at least 1, got 0"),
        ({"stage1__lr": -1.0}, r"'stage1': lr must be at least 0, got -1.0"),
        ({"stage1__clip": 0}, r"'stage1': clip must be greater than 0"),
        ({"stage1__betas": [0.9, 1]}, r"'stage1': betas must lie in \[0, 1\), got 0.9, 1"),
        ({"stage1__train": []}, r"'stage1': train names no parameter; to leave a stage out, set its steps to 0"),
        ({"stage3__temperature": 0}, r"'stage3': temperature must be greater than 0"),
        ({"data__sources": []}, r"'data': sources is empty"),
        ({"data__workers": -1}, r"'data': workers must be at least 0, got -1"),
        ({"data__max_length": 0}, r"'data': max_length must be at least 1, got 0"),
        ({"stage1__checkpoint_every": 0}, r"'stage1': checkpoint_every must be at least 1, got 0"),
        *[({"stage3__loss_scale": x}, "'stage3': loss_scale must be greater than 0") for x in (0, -1.0)],
        *[({"stage3__lr_scale": {"mlp": x}}, "'stage3': lr_scale.mlp must be greater than 0") for x in (0, -0.5)],
        ({"stage3__lr_scale": {"mlp": 1e10}}, "'stage3': lr_scale.mlp must be at most 1,000,000,000"),
        ({"stage1__betas": [-0.1, 0.9]}, r"'stage1': betas must lie in \[0, 1\)"),
        ({"stage1__warmup": -0.1}, "'stage1': warmup must be at least 0"),
        ({"stage1__decay": -0.1, "stage1__warmup": 0.5}, "'stage1': decay must be at least 0"),
        ({"stage1__weight_decay": -1}, "'stage1': weight_decay must be at least 0"),
        ({"stage3__supervised": -1}, "'stage3': supervised must be at least 0"),
        ({"stage3__prompt_weight": -1}, "'stage3': prompt_weight must be at least 0"),
        ({"stage1__steps": 10**18}, "'stage1': steps must be at most"),
        ({"stage1__batch_size": 10**9}, "'stage1': batch_size must be at most"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"data__scale": 0}, "'data': scale must be greater than 0"),
        ({"data__workers": 10**6}, "'data': workers must be at most 128"),
        ({"data__max_tiles": 0}, "'data': max_tiles must be at least 1"),
        ({"data__sources": [{"path": "a", "weight": -1}]}, r"'data.sources\[0\]': weight must be at least 0"),
        ({"data__sources": [{"path": "a", "weight": 0}]}, "'data': sources: every weight is 0"),
        ({"data__sources": [{"path": ""}]}, r"'data.sources\[0\]': path must be a file"),
        ({"mixer": {"norm_eps": 0}}, "'mixer': norm_eps must be positive"),
        ({"mixer": {"dt_min": -1}}, "'mixer': dt_min .* must satisfy"),
        ({"data__on_bad_sample": "ignore"}, r"'data.on_bad_sample' must be .*'stop'.*'skip'.*, got 'ignore'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(tmp_path, changes, message):
    path = small_run.write_recipe(tmp_path / "mine.yaml", small_run.recipe(**changes))
    with pytest.raises(UserError, match=message) as error:
        load_recipe(DistillRecipe, path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


NUMBERS = [
    *(f"{stage}.{name}" for stage in ("stage1", "stage3") for name in (
        "lr", "warmup", "decay", "weight_decay", "clip", "prompt_weight", "loss_scale", "supervised", "temperature",
        "lr_scale.mlp", "betas.0",
    )),
    "data.scale", "data.sources.0.weight", "mixer.dt_min", "mixer.dt_max", "mixer.norm_eps",
]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_finite(key):
    betas = [f"{stage}.betas=[0.9, 0.9]" for stage in ("stage1", "stage3")]
    for text in (".inf", "-.inf", ".nan", "1e999", "'1e999'", "1" + "0" * 399, "'nan'"):
        with pytest.raises(UserError, match=r"finite|must be"):
            load_recipe(DistillRecipe, "pico-linear", [*betas, f"{key}={text}"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_built_in_python_is_checked_too(value):
    plan = small()
    for config, names in ((plan.stage3, ("lr", "warmup", "clip", "loss_scale", "temperature", "weight_decay")),
                          (plan.data, ("scale",)), (plan.mixer, ("dt_max", "norm_eps"))):  # fmt: skip
        for name in names:
            with pytest.raises(ValueError, match=name):
                replace(config, **{name: value})


def test_a_missing_key_is_named(tmp_path):
    plan = small_run.recipe()
    del plan["stage2"]["lr"]
    with pytest.raises(UserError, match=r"missing required key 'stage2.lr'"):
        load_recipe(DistillRecipe, small_run.write_recipe(tmp_path / "mine.yaml", plan))


def test_overrides_are_as_strict_as_the_file(tmp_path):
    path = small_run.write_recipe(tmp_path / "mine.yaml", small_run.recipe())
    plan = load_recipe(DistillRecipe, path, ["stage3.steps=100", "seed=7", "mixer.rope=true"])
    assert (plan.stage3.steps, plan.seed, plan.mixer.rope) == (100, 7, True)
    with pytest.raises(UserError, match=r"'stage3.stepz'.*did you mean 'steps'"):
        load_recipe(DistillRecipe, path, ["stage3.stepz=100"])


def test_an_unknown_recipe_lists_the_built_in_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder "recipes"
    with pytest.raises(UserError, match="nano-lniear: no such recipe file; built-in recipes: ") as error:
        find_recipe("nano-lniear")
    assert all(path.stem in str(error.value) for path in SHIPPED)
    assert find_recipe("nano-linear") == find_recipe("recipes/nano-linear.yaml") == RECIPES / "nano-linear.yaml"


# ---------------------------------------------------------------------------------------------- schedule


def train_config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "batch_size": 1, "lr": 1.0, "warmup": 0.1, "decay": 0.2, **changes})


def test_the_schedule_rises_stays_and_falls():
    config = train_config()
    factors = [config.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert set(factors[10:80]) == {1.0}
    assert factors[80] == pytest.approx(20 / 21) and factors[99] == pytest.approx(1 / 21)
    assert factors[:11] == sorted(factors[:11]) and factors[79:] == sorted(factors[79:], reverse=True)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_step_is_wasted_on_a_rate_of_zero(shares, steps):
    config = train_config(steps=steps, warmup=shares[0], decay=shares[1])
    assert all(0 < config.factor(step) <= 1 for step in range(steps))
    if shares == (0.0, 0.0):
        assert {config.factor(step) for step in range(steps)} == {1.0}


def test_stage_defaults_are_the_papers():
    stage = StageConfig(steps=1, batch_size=1, lr=1.0, train=("conv",))
    assert (stage.prompt_weight, stage.reduction, stage.supervised, stage.temperature) == (1.0, "mean", 0.0, 1.0)
