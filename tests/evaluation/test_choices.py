"""How a multiple-choice answer is read: an option's own text, its letter, and English that is neither."""

from __future__ import annotations

import pytest

from mmmamba.evaluation.choices import choice_answer
from mmmamba.evaluation.scoring import score_answer

PETS = ["dog", "cat"]
NINE = [f"option text {i}" for i in range(9)]  # the letter I is on offer


@pytest.mark.parametrize(
    "text",
    [
        "B", "(B)", "B.", "B)", "B:", "b", "(b)", "b)", "**B**", "`B`", "[B]", "$B$", "\\boxed{B}", "B. cat", "(B) cat",
        "Answer: B", "Answer:B", "answer: b", "The answer is B.", "The answer is (B)", "The answer is: b",
        "The correct answer is option (b).", "The final answer is: **(B) cat**", "The answer is $\\boxed{B}$",
        "Option B", "option b is right", "I think it is B", "I'm sure it's B.", "The answer would be B",
        "cat", "Cat.", "a cat", "The cat", "The answer is a cat.", "It is a cat.", "cat because it has whiskers",
    ],
)  # fmt: skip
def test_the_second_option_is_chosen(text: str) -> None:
    assert choice_answer(text, PETS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "", "E", "a bird", "Both", "A and B", "A or B", "Neither A nor B", "dog or cat", "A lot of things",
        "I don't know", "It is not a cat", "The answer is not A", "B's", "cats", "The answer is A or the answer is B",
    ],
)  # fmt: skip
def test_nothing_is_chosen_and_nothing_is_guessed(text: str) -> None:
    assert choice_answer(text, PETS) is None


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("Answer: a mixture", ["a compound", "a mixture"], "B"),
        ("C. elegans", ["C. elegans", "D. melanogaster"], "A"),
        ("C. elegans", ["E. coli", "C. elegans"], "B"),
        ("The answer is C. elegans.", ["x1", "y1", "z1", "C. elegans"], "D"),
        ("It is vitamin C.", ["Vitamin A", "Vitamin B", "Vitamin D", "Vitamin C"], "D"),
        ("Hepatitis B", ["Hepatitis A", "Hepatitis B", "Hepatitis C"], "B"),
        ("B cells", ["B cell", "T cell"], None),  # neither the text of an option nor a letter
        ("B", ["B", "A"], "A"),  # options that are letters: the text wins
        ("a", ["a", "an"], "A"),
        ("the cat", ["cat", "the cat"], "B"),
        ("red and blue", ["red", "red and blue"], "B"),
        ("It is red and blue.", ["red", "red and blue"], "B"),
        ("red", ["red", "red and blue"], "A"),
        ("10", ["1", "2", "10"], "C"),
        ("There are 2.", ["1", "2", "10"], "B"),
        ("2.5", ["2", "3"], None),
        ("-2", ["2", "3"], None),
        ("1/2", ["2", "3"], None),
        ("100%", ["10%", "100%"], "B"),
        ("No", ["yes", "no"], "B"),
        ("No, it is not.", ["yes", "no"], "B"),
        ("The answer is no.", ["yes", "no"], "B"),
        ("pH", ["PH", "pH"], "B"),  # equal but for case: to the letter
        ("Ph", ["PH", "pH"], None),
        ("I", NINE, "I"),
        ("I think so", NINE, None),
        ("The answer is I don't know", NINE, None),
        ("eleventh", [*map(str, range(100, 110)), "eleventh"], "K"),  # beyond J
        ("It is K.", [*map(str, range(100, 110)), "eleventh"], "K"),
    ],
)
def test_an_options_own_text_wins(text: str, choices: list[str], letter: str | None) -> None:
    assert choice_answer(text, choices) == letter


def test_a_reference_that_is_a_letter_stays_one_where_options_are_letters() -> None:
    assert score_answer("choice", "A", ["B"], ["B", "A"]) == 1  # the text of option B
    assert score_answer("choice", "B", ["B"], ["B", "A"]) == 0
