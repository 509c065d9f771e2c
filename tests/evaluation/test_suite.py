"""Which questions are asked, and what counts as their right answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from question_files import record

from mmmamba.errors import UserError
from mmmamba.evaluation.suite import NANO_ABILITIES, nano_suite, own_suite

Own = Callable[..., Path]


def test_nano_suite_has_every_ability_in_order(nano_data: Path) -> None:
    suite = nano_suite(nano_data)
    assert suite.abilities == NANO_ABILITIES
    assert len(suite.items) == 4 * len(NANO_ABILITIES)
    assert {item.references for item in suite.items} == {("0",), ("1",), ("2",), ("3",)}


def test_a_smaller_limit_asks_a_part_of_the_same_questions(nano_data: Path) -> None:
    def ids(limit: int, seed: int = 0) -> set[str]:
        return {item.sample.id for item in nano_suite(nano_data, limit=limit, seed=seed).items}

    assert len(ids(2)) == 2 * len(NANO_ABILITIES)
    assert ids(2) == ids(2)
    assert ids(1) < ids(2) < ids(3)
    assert any(ids(2) != ids(2, seed) for seed in range(1, 4))


def test_abilities_can_be_left_out(nano_data: Path) -> None:
    assert nano_suite(nano_data, abilities=["recall-1x", "easy"]).abilities == ("easy", "recall-1x")
    with pytest.raises(UserError, match="unknown ability 'raed'; known: easy, read"):
        nano_suite(nano_data, abilities=["raed"])


def test_data_that_is_not_built_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mmmamba data build --out \S+missing"):
        nano_suite(tmp_path / "missing")


def test_a_limit_below_one_is_refused(nano_data: Path) -> None:
    with pytest.raises(UserError, match="limit must be at least 1, got 0"):
        nano_suite(nano_data, limit=0)


def test_reference_is_the_last_turn_or_a_key(own_data: Own) -> None:
    path = own_data(
        record("a", "q", "red"),
        record("b", "q", "red", answer="blue"),
        record("c", "q", "red", answers=["blue", "navy"]),
        record("d", "q", "red", answers=[{"answer": "blue", "answer_id": 1}]),
        {"id": "e", "conversations": [{"from": "human", "value": "q"}], "answer": 3},
    )
    items = own_suite(path).items
    assert [item.references for item in items] == [("red",), ("blue",), ("blue", "navy"), ("blue",), ("3",)]
    assert [item.sample.turns[-1].role for item in items] == ["gpt"] * 5
    assert items[4].sample.turns[-1].text == "3"
    assert items[0].ability == "all"


def test_choice_references_become_letters(own_data: Own) -> None:
    choices = ["a cat", "a dog"]
    path = own_data(
        record("a", "q", "B", choices=choices),
        record("b", "q", "a dog", choices=choices),
        record("c", "q", "B. a dog", choices=choices),
        record("d", "q", "?", choices=choices, answer=1),
        record("e", "q", "(B)"),
    )
    assert {item.references for item in own_suite(path, metric="choice").items} == {("B",)}


@pytest.mark.parametrize(
    ("metric", "bad", "message"),
    [
        ("yes_no", record("x", "q", "maybe"), "needs the answer 'yes' or 'no', got 'maybe'"),
        ("choice", record("x", "q", "a bird", choices=["a cat", "a dog"]), "needs a letter or an option's text"),
        ("exact", {"id": "x", "conversations": [{"from": "human", "value": "q"}]}, "no reference answer"),
        ("exact", record("x", "q", "a", answers=[None]), "field 'answers' must be text"),
        ("exact", record("x", "q", "a", chance=2), "field 'chance' must be a number from 0 to 1"),
    ],
)
def test_bad_samples_stop_or_are_listed(own_data: Own, metric: str, bad: dict[str, object], message: str) -> None:
    good = record("good", "q", "no" if metric == "yes_no" else "B")
    path = own_data(bad, good)
    with pytest.raises(UserError, match=rf"questions\.jsonl:1: .*{message}"):
        own_suite(path, metric=metric)
    suite = own_suite(path, metric=metric, on_bad_sample="skip")
    assert [item.sample.id for item in suite.items] == ["good"]
    (note,) = suite.bad_samples
    assert note["id"] == "x"
    assert note["where"].endswith("questions.jsonl:1")
    assert message in note["reason"]


def test_a_line_that_is_no_json_can_be_skipped(own_data: Own) -> None:
    path = own_data(record("good", "q", "a"))
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match=r"questions\.jsonl:1"):
        own_suite(path)
    assert len(own_suite(path, on_bad_sample="skip").bad_samples) == 1


def test_mme_is_limited_by_pictures_and_needs_pairs(own_data: Own) -> None:
    def pair(name: str) -> list[dict[str, object]]:
        return [record(f"{name}-{i}", "q", "yes", f"{name}.png", ability="OCR") for i in range(2)]

    path = own_data(*pair("a"), *pair("b"), *pair("c"))
    items = own_suite(path, metric="mme", limit=2).items
    assert len(items) == 4
    assert len({item.unit for item in items}) == 2
    path = own_data(*pair("a"), pair("b")[0])
    with pytest.raises(UserError, match=r"two questions per image; .*b\.png \(OCR\) has 1"):
        own_suite(path, metric="mme")


def test_empty_and_unknown(own_data: Own) -> None:
    with pytest.raises(UserError, match="no question to ask"):
        own_suite(own_data())
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        own_suite(own_data(record("a", "q", "b")), metric="bleu")


def test_an_ability_is_a_text_and_null_is_none(own_data: Own) -> None:
    path = own_data(record("a", "q", "x", ability=None), record("b", "q", "x", ability="two"), record("c", "q", "x"))
    assert [item.ability for item in own_suite(path).items] == ["all", "all", "two"]
    for wrong in (3, True, ["a"], {"a": 1}, "", " ", "\ud800"):
        why = "half a character" if wrong == "\ud800" else "'ability'"  # no JSON of ours holds one
        path = own_data(record("a", "q", "x"))
        path.write_text(json.dumps(record("b", "q", "x", ability=wrong)) + "\n")
        with pytest.raises(UserError, match=rf"questions\.jsonl:1: .*{why}"):
            own_suite(path)


def test_a_choice_beyond_the_letters_and_a_number_beyond_reading_are_refused(own_data: Own) -> None:
    for wrong in (record("x", "q", "A", choices=[f"o{i}" for i in range(27)]), record("x", "q", "9" * 5000)):
        with pytest.raises(UserError, match=r"questions\.jsonl:1: .*choice"):
            own_suite(own_data(wrong), metric="choice")
