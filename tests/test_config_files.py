"""Configuration is strict: what is read is what was written, and every mistake is named with its file and key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.checkpoints.hovle import config_from_hovle
from mmmamba.config_files import apply_overrides, dump_yaml, from_dict, load_yaml, to_dict
from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import Mamba2Options
from mmmamba.model.stack import StackConfig


@dataclass(frozen=True, kw_only=True)
class Stage:
    steps: int
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    teacher: str
    seed: int = 0
    out: Path | None = None
    kind: Literal["linear", "hybrid", 3] = "linear"
    stages: dict[str, Stage] = field(default_factory=dict)
    extra: Stage | None = None
    layers: tuple[int, ...] = ()
    weights: list[float] = field(default_factory=list)
    max_tokens: int | str = "auto"
    fraction: int | float | None = None
    anything: Any = None
    shuffle: bool = True
    plain: list = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    keys: set[int]


def read(data: dict[str, Any]) -> Recipe:
    return from_dict(Recipe, {"teacher": "nano", **data}, "r.yaml")


text = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
stages = st.builds(Stage, steps=st.integers(0, 10**9), rate=numbers, betas=st.tuples(numbers, numbers))
recipes = st.builds(
    Recipe,
    teacher=text,
    seed=st.integers(),
    out=st.none() | text.map(Path),
    kind=st.sampled_from(["linear", "hybrid", 3]),
    stages=st.dictionaries(text, stages, max_size=3),
    extra=st.none() | stages,
    layers=st.lists(st.integers(), max_size=4).map(tuple),
    weights=st.lists(numbers, max_size=4),
    max_tokens=st.integers() | text,
    fraction=st.none() | st.integers() | numbers,
    anything=st.recursive(st.none() | st.booleans() | text, lambda inner: st.lists(inner, max_size=2), max_leaves=4),
    shuffle=st.booleans(),
    plain=st.lists(st.integers(), max_size=2),
)


@settings(deadline=None)
@given(recipes)
def test_round_trip_through_dicts_and_yaml(recipe: Recipe) -> None:
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert from_dict(Recipe, yaml.safe_load(dump_yaml(recipe))) == recipe


def test_model_config_round_trip() -> None:
    stack = StackConfig(num_layers=1, intermediate_size=8, num_heads=4, num_kv_heads=2, head_dim=4)
    config = ModelConfig(
        hidden_size=16,
        vocab_size=32,
        embedding=stack,
        decoder=stack,
        layer_map=("attention", "mamba2"),
        mixer=Mamba2Options(rope=True),
        special_token_maps={"<img>": 3},
    )
    assert from_dict(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sead": 1}, "r.yaml: unknown key 'sead' (did you mean 'seed'?)"),
        (
            {"stages": {"stage1": {"stepz": 1}}},
            "r.yaml: unknown key 'stages.stage1.stepz' (did you mean 'steps'?)",
        ),
        ({"extra": {"steps": 1, "zzz": 1}}, "r.yaml: unknown key 'extra.zzz' (known: steps, rate, betas)"),
        ({1: 2}, "r.yaml: unknown key '1' (known: "),
        ({"seed": "abc"}, "r.yaml: 'seed' must be int, got 'abc' (str)"),
        ({"seed": True}, "r.yaml: 'seed' must be int, got True (bool)"),
        ({"seed": None}, "r.yaml: 'seed' must be int, got null"),
        ({"seed": 1.0}, "r.yaml: 'seed' must be int, got 1.0 (float)"),
        ({"shuffle": 1}, "r.yaml: 'shuffle' must be bool, got 1 (int)"),
        ({"kind": "cubic"}, "r.yaml: 'kind' must be 'linear' or 'hybrid' or 3, got 'cubic' (str)"),
        ({"extra": 3}, "r.yaml: 'extra' must be a mapping of keys to values (Stage) or null, got 3 (int)"),
        ({"extra": {}}, "r.yaml: missing required key 'extra.steps'"),
        ({"extra": {"steps": -1}}, "r.yaml: 'extra': steps must not be negative, got -1"),
        ({"extra": {"steps": 1, "rate": "fast"}}, "r.yaml: 'extra.rate' must be a number, got 'fast' (str)"),
        ({"extra": {"steps": 1, "rate": 10**400}}, "r.yaml: 'extra.rate' must be a number, got 1000"),
        ({"extra": {"steps": 1, "betas": [1]}}, "r.yaml: 'extra.betas' must be a list of 2: a number, a number, got"),
        ({"layers": "0, 1"}, "r.yaml: 'layers' must be a list of int, got '0, 1' (str)"),
        ({"layers": [0, "x"]}, "r.yaml: 'layers[1]' must be int, got 'x' (str)"),
        ({"stages": []}, "r.yaml: 'stages' must be a mapping to a mapping of keys to values (Stage), got [] (list)"),
        ({"stages": {1: {"steps": 1}}}, "r.yaml: 'stages (key)' must be str, got 1 (int)"),
        ({"out": 3}, "r.yaml: 'out' must be a path or null, got 3 (int)"),
        ({"max_tokens": [1]}, "r.yaml: 'max_tokens' must be int or str, got [1] (list)"),
        ({"plain": 1}, "r.yaml: 'plain' must be a list, got 1 (int)"),
    ],
)
def test_mistakes_are_named(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read(data)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_missing_and_misplaced() -> None:
    with pytest.raises(UserError, match=r"^missing required key 'teacher'$"):
        from_dict(Recipe, {})
    with pytest.raises(UserError, match=r"^r.yaml: missing required keys 'embedding', 'decoder'$"):
        from_dict(ModelConfig, {"hidden_size": 1, "vocab_size": 1}, "r.yaml")
    with pytest.raises(UserError, match=r"^r.yaml: the top level must be a mapping of keys to values \(Recipe\)"):
        from_dict(Recipe, [], "r.yaml")  # type: ignore[arg-type]


def test_numbers_as_yaml_reads_them() -> None:
    """YAML 1.1 reads 1e-3 as a string for want of a dot; a float field takes it, and an int, all as floats."""
    assert yaml.safe_load("1e-3") == "1e-3"
    stage = from_dict(Stage, yaml.safe_load("{steps: 1, rate: 1e-3, betas: [1, .5]}"))
    assert stage == Stage(steps=1, rate=1e-3, betas=(1.0, 0.5))
    assert isinstance(stage.betas[0], float)


def test_union_prefers_the_exact_type() -> None:
    assert type(read({"fraction": 3}).fraction) is int
    assert type(read({"fraction": 3.0}).fraction) is float
    assert read({"max_tokens": "12"}).max_tokens == "12"


def test_unsupported_annotation_is_our_mistake() -> None:
    with pytest.raises(TypeError):
        from_dict(Unsupported, {"keys": [1]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ":4: the key 'c' appears here again (first on line 3)"),
        ("a: [1\nb: 2\n", ":2: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", ":2: found character '\\t'"),
        ("a: *x\n", ":1: found undefined alias 'x'"),
        ("a: !!python/name:os.system\n", ":1: the tag '!!python/name:os.system' is not read here"),
        ("? [1, 2]\n: 3\n", ":1: a key must be a single value, not a list"),
        ("a: \x01\n", ": unacceptable character"),
        ("", ": the top level must be a mapping of keys to values, got nothing (the file is empty)"),
        ("- 1\n", ": the top level must be a mapping of keys to values, got [1] (list)"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_yaml(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text \(byte 3\)"):
        load_yaml(tmp_path / "latin.yaml")


def test_yaml_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base: &base {steps: 1}\nmore: &more\n  <<: *base\n  steps: 2\nlast: {<<: *more, rate: 3}\n")
    assert load_yaml(path)["last"] == {"steps": 2, "rate": 3}


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("teacher: nano\nstages:\n  one: {steps: 1}\nlayers: [1, 2]\nextra:\n")
    overrides = ["stages.one.steps=7", "stages.two={steps: 3}", "layers.1=5", "extra.steps=2", "out=", "teacher=a=b"]
    recipe = from_dict(Recipe, load_yaml(path, overrides))
    assert recipe == Recipe(
        teacher="a=b", stages={"one": Stage(steps=7), "two": Stage(steps=3)}, layers=(1, 5), extra=Stage(steps=2)
    )


def test_overrides_leave_the_original_alone() -> None:
    data = {"a": {"b": [1, {"c": 2}]}}
    assert apply_overrides(data, ["a.b.1.c=3"]) == {"a": {"b": [1, {"c": 3}]}}
    assert data == {"a": {"b": [1, {"c": 2}]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "must read key.path=value"),
        ("=3", "must read key.path=value"),
        ("a..b=3", "must read key.path=value"),
        ("a=[1", "override 'a=[1': expected"),
        ("a.b=3", "'a' is 1 (int), which has no 'b'"),
        ("list.2=3", "'list' is a list of 2, which has no '2'"),
        ("list.x.y=3", "'list' is a list of 2, which has no 'x'"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides({"a": 1, "list": [1, 2]}, [override])
    assert message in str(error.value)


def test_a_user_error_is_a_value_error_and_says_its_place_once() -> None:
    with pytest.raises(ValueError) as refusal:
        config_from_hovle({"llm_config": {"hidden_size": "many"}, "embedding_config": {}}, "config.json")
    assert isinstance(refusal.value, UserError)
    assert str(refusal.value).count("config.json") == 1
