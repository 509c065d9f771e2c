"""Scoring rules against worked examples of the published ones, and properties that hold for any text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmamba.evaluation import scoring

TEXT = st.text(max_size=40)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("Red", "red", 1), (" red. ", "Red", 1), ("dark  red", "dark red", 1), ("red circle", "red", 0), ("", "red", 0)],
)
def test_exact(prediction: str, reference: str, score: float) -> None:
    assert scoring.score_answer("exact", prediction, [reference]) == score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat though.", "yes"),  # the first sentence only
        ("A dog", "yes"),  # the published rule: neither word counts as yes
        ("nothing", "yes"),  # a word, not a part of one
    ],
)
def test_pope_answer(text: str, answer: str) -> None:
    assert scoring.pope_answer(text) == answer


def test_yes_no_summary_is_that_of_a_confusion_matrix() -> None:
    predictions = ["yes", "yes", "yes", "no", "no", "hm"]
    references = ["yes", "yes", "no", "yes", "no", "no"]
    summary = scoring.yes_no_summary(predictions, references)  # TP 2, FP 2 (hm counts as yes), FN 1, TN 1
    assert summary["accuracy"] == pytest.approx(3 / 6)
    assert summary["precision"] == pytest.approx(2 / 4)
    assert summary["recall"] == pytest.approx(2 / 3)
    assert summary["f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert summary["yes_ratio"] == pytest.approx(4 / 6)
    assert summary["unparsed"] == 1


def test_yes_no_summary_without_any_yes() -> None:
    summary = scoring.yes_no_summary(["no"], ["no"])
    assert summary["accuracy"] == 1 and summary["yes_ratio"] == 0
    assert [summary[name] for name in ("precision", "recall", "f1")] == [None] * 3  # ratios to nothing
    summary = scoring.yes_no_summary(["no", "no"], ["no", "yes"])
    assert (summary["precision"], summary["recall"], summary["f1"]) == (None, 0, 0)
    assert scoring.yes_no_summary([], [])["accuracy"] is None
    with pytest.raises(ValueError, match="a question at least"):
        scoring.mme_summary([], [])


CHOICES = ["a cat", "a dog", "B", "two dogs"]


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("B", [], "B"),
        ("b", [], "B"),
        ("(B)", [], "B"),
        ("(B) a dog", [], "B"),
        ("B.", [], "B"),
        ("B. a dog", [], "B"),
        ("B: a dog", [], "B"),
        ("The answer is B.", [], "B"),
        ("The answer is (B)", [], "B"),
        ("Answer: B", [], "B"),
        ("So the answer is option C, because", [], "C"),
        ("The answer is A or the answer is B", [], None),
        ("a dog", CHOICES, "B"),
        ("A dog.", CHOICES, "B"),  # the article is no letter
        ("The answer is two dogs.", CHOICES, "D"),
        ("E", CHOICES, None),  # not on offer
        ("The answer is a cat", CHOICES, "A"),
        ("a bird", CHOICES, None),
        ("Both", CHOICES, None),
        ("", CHOICES, None),
    ],
)
def test_choice_answer(text: str, choices: list[str], letter: str | None) -> None:
    assert scoring.choice_answer(text, choices) == letter


@given(st.sampled_from("ABCDE"), st.sampled_from(["{}", "({})", "{}.", "{}. some text", "The answer is {}."]))
def test_any_letter_in_any_usual_form(letter: str, form: str) -> None:
    assert scoring.choice_answer(form.format(letter), ["u", "v", "w", "x", "y"]) == letter


@pytest.mark.parametrize(
    ("text", "answer"), [("Yes, it is", "yes"), (" no", "no"), ("NO.", "no"), ("It is yes", None), ("", None)]
)
def test_mme_answer(text: str, answer: str | None) -> None:
    assert scoring.mme_answer(text) == answer


def test_mme_score_counts_questions_and_pictures() -> None:
    summary = scoring.mme_summary([1, 1, 1, 0, 0, 0], ["a", "a", "b", "b", "c", "c"])
    assert summary == pytest.approx({"accuracy": 3 / 6, "accuracy_plus": 1 / 3, "score": 100 * (3 / 6 + 1 / 3)})
    assert scoring.mme_summary([1, 1], ["a", "a"])["score"] == 200


def test_mme_totals_know_the_official_subtasks() -> None:
    totals = scoring.mme_totals({"existence": 190.0, "OCR": 100.0, "code_reasoning": 50.0, "own": 10.0})
    assert totals == {"perception": 290.0, "cognition": 50.0, "total": 350.0}


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Red car.", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("red/blue", "red blue"),
        ("hello (world)", "hello world"),
        ("left - right", "left right"),
        ("coca-cola", "coca cola"),
        ("what?", "what"),
        ("dog's", "dog 's"),
        ("a\nb", "b"),
        ("", ""),
    ],
)
def test_vqa_normalise(text: str, normalised: str) -> None:
    assert scoring.vqa_normalise(text) == normalised


@given(st.sampled_from(["red", "2", "stop sign", "don't", "3.5"]))
def test_vqa_normalised_words_stay(text: str) -> None:
    assert scoring.vqa_normalise(scoring.vqa_normalise(text)) == scoring.vqa_normalise(text)


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """The definition, word for word: the mean over subsets of all humans but one of min(matches / 3, 1)."""
    subsets = itertools.combinations(range(len(answers)), len(answers) - 1)
    return sum(min(sum(answers[i] == prediction for i in s) / 3, 1) for s in subsets) / len(answers)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=4, max_size=12))
def test_vqa_accuracy_is_the_leave_one_out_mean(answers: list[str]) -> None:
    assert scoring.vqa_accuracy("red", answers) == pytest.approx(leave_one_out("red", answers))


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_humans(agreeing: int, accuracy: float) -> None:
    answers = ["The cat."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert scoring.vqa_accuracy("cat", answers) == pytest.approx(accuracy)


def test_gqa_has_one_answer() -> None:
    assert scoring.score_answer("vqa", "A table.", ["table"]) == 1
    assert scoring.score_answer("vqa", "chair", ["table"]) == 0


@given(st.sampled_from(scoring.METRICS), TEXT, st.lists(TEXT, min_size=1, max_size=10), st.lists(TEXT, max_size=6))
def test_any_answer_gets_a_score_from_0_to_1(metric: str, text: str, references: list[str], choices: list[str]) -> None:
    assert 0 <= scoring.score_answer(metric, text, references, choices) <= 1
    assert scoring.agrees(metric, text, text, choices)


@given(TEXT, TEXT, st.sampled_from(scoring.METRICS))
def test_agreement_goes_both_ways(one: str, other: str, metric: str) -> None:
    assert scoring.agrees(metric, one, other) == scoring.agrees(metric, other, one)
