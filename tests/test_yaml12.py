"""YAML is version 1.2's core schema, within bounds: what two versions read differently is refused, never guessed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.config_files import apply_overrides, load_yaml
from mmmamba.errors import UserError
from mmmamba.yaml12 import MAX_DEPTH, BadYaml, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("Off", "Off"), ("y", "y"), ("true", True), ("False", False),
        ("1:30", "1:30"), ("1:30:00.5", "1:30:00.5"), ("1_000", "1_000"), ("0x10", 16), ("0o17", 15), ("0x_", "0x_"),
        ("2020-01-01", "2020-01-01"), ("2020-13-01", "2020-13-01"), ("0b11", "0b11"), ("=", "="), ("-0x10", "-0x10"),
        ("1e-3", 1e-3), ("1.", 1.0), (".5", 0.5), ("+12", 12), ("-0", 0), ("0", 0), ("00.5", 0.5), ("~", None),
        ("Null", None), ("", None), ("'010'", "010"), ('"1e3"', "1e3"), ("!!str 010", "010"), ("! 12", "12"),
        ("!!float 1", 1.0), ("!!int 0x1f", 31), ("!!null ''", None), ("!!bool true", True), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_of_the_core_schema(text: str, value: Any) -> None:
    found = parse(f"a: {text}\n")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("010", "010 is an octal number in YAML 1.1 and a decimal one in 1.2: write 10"),
        ("-007", "write -7"), ("08", "write 8"), ("00", "write 0"),
        (".inf", "not a finite number"), ("-.INF", "not a finite number"), (".nan", "not a finite number"),
        ("1e999", "not a finite number"), ("9" * 5000, "5,000 digits"), ("0x" + "f" * 5000, "digits"),
        ("!!int ''", "'' is not of its tag '!!int'"), ("!!int 0x_", "not of its tag"), ("!!float x", "not of its tag"),
        ("!!bool yes", "not of its tag"), ("!!timestamp 2020-13-01", "tag '!!timestamp' is not read"),
        ("!!binary x", "tag"), ("!!set {a}", "tag"), ("!mine 1", "tag"), ("!!python/name:os.system", "tag"),
        (r'"\UFFFFFFFF"', "not usable YAML"), (r'"\ud800"', "half of a surrogate pair"),
        ("[&b [*b]]", "is inside what it repeats"), ("{[1]: 2}", "a key must be a single value"),
        ("[&b [1], {*b : 2}]", "a key must be a single value"), ("{1: 2, 0x1: 3}", "the key '1' appears here again"),
        ("{true: 1, 1: 2}", "appears here again"), ("{<<: 1}", "'<<' takes a mapping"),
        ("{b: 1, 'b': 2}", "the key 'b' appears here again"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(text: str, problem: str) -> None:
    with pytest.raises(BadYaml) as error:
        parse(f"\na: {text}\n")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_line_and_an_override_are_named(tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1\nb: 010\n")
    with pytest.raises(UserError, match=r"r\.yaml:2: 010 is an octal"):
        load_yaml(tmp_path / "r.yaml")
    with pytest.raises(UserError, match=r"override 'a\.b=010': 010 is an octal"):
        apply_overrides({}, ["a.b=010"])
    with pytest.raises(BadYaml, match="second document"):
        parse("a: 1\n---\nb: 2\n")


def tenfold(i: int) -> str:
    return ",".join([f"*a{i}"] * 10)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [{tenfold(i)}]\n" for i in range(12)),
        "a: &a0 {k: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [{tenfold(i)}], k{i}: 1}}\n" for i in range(12)),
        "[" * 200_000, "{a: " * 60_000, "- " * 100_000, "? " * 100_000, "[\n" * 100_000, "a" * 300_000,
    ],
    ids=["laughs", "merges", "flow", "mappings", "dashes", "keys", "lines", "long"],
)  # fmt: skip
def test_bombs_are_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(BadYaml):
        parse(text)
    assert time.process_time() - began < 5


def test_aliases_and_merges_within_bounds() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {z: 3, <<: [{y: 9}, *b]}\nd: [*a, *a]\n"
    assert parse(text) == yaml.safe_load(text)
    assert list(parse(text)["c"]) == list(yaml.safe_load(text)["c"])


texts = st.text(st.characters(codec="utf-8"), max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(["1e-3", "0o17", "010", "yes", "1:30", "2020-01-01", ".inf", "1_000", "=", "<<", "-.5e1", "0x1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(plain, st.booleans())
def test_what_is_dumped_is_read_back_by_both_versions(data: Any, flow: bool) -> None:
    text = dump(data, flow=flow)
    assert parse(text) == data
    assert yaml.safe_load(text) == data


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "[",
                "]",
                "{",
                "}",
                "&a ",
                "*a",
                ": ",
                "- ",
                "\n",
                "  ",
                "a",
                "1",
                "!!int ",
                "!x ",
                "? ",
                "<<: ",
                "\t",
                '"',
                "'",
                "|",
                ">",
                "%YAML 9.9\n",
                "---",
                "\\U99999999",
                "\x85",
                "0x_",
                "...",
                "#",
                ",",
                "@",
                "`",
                "%",
                "!<",
                ".nan",
                "!!int ''",
            ]
        ),
        max_size=30,
    )
)
def test_any_text_is_read_or_refused(parts: list[str]) -> None:
    try:
        parse("".join(parts))
    except BadYaml as error:
        assert "\n" not in str(error)
