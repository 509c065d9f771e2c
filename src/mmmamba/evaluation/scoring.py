"""How one generated answer is scored: exact match and the published rules of POPE, MME and TextVQA/GQA.

How the answer to a multiple-choice question is read is in :mod:`mmmamba.evaluation.choices`.

Pure functions of text. `score_answer` turns a prediction into a number in [0, 1]; the others are its pieces
and the extra numbers that a rule reports over a whole set (POPE's F1, MME's acc+).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from mmmamba.evaluation.choices import LETTERS, choice_answer, normalise

Metric = Literal["exact", "yes_no", "choice", "mme", "vqa"]
METRICS: tuple[str, ...] = get_args(Metric)

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# From this many human answers on, a list of answers is a vote (VQA); a shorter one is a list of accepted answers.
VOTES_FROM = 4


# --- yes / no (POPE) and MME ------------------------------------------------------------------------------------------


def pope_answer(text: str) -> str:
    """POPE's reading of an answer: in its first sentence ``no`` or ``not`` means no, anything else means yes.

    This is the published rule (case ignored), so an answer that says neither counts as yes; `says_yes_or_no` tells
    those apart, and they are reported as ``unparsed``.
    """
    words = text.strip().split(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"


def says_yes_or_no(text: str) -> bool:
    return re.search(r"\b(yes|no|not)\b", text.lower()) is not None


def mme_answer(text: str) -> str | None:
    """MME's reading: ``yes`` or ``no`` within the first four characters; None (always wrong) otherwise."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


# --- open answers (VQA, TextVQA, GQA) ---------------------------------------------------------------------------------

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_APOSTROPHE_WORDS = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've she's shouldn't shouldn't've should've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _spellings_without_apostrophes(words: Iterable[str]) -> dict[str, str]:
    """Each spelling with one or all apostrophes missing → the word (``dont`` → ``don't``)."""
    found: dict[str, str] = {}
    for word in words:
        marks = [i for i, character in enumerate(word) if character == "'"]
        for spelling in [word.replace("'", ""), *(word[:i] + word[i + 1 :] for i in marks)]:
            found[spelling] = word
    return found


_CONTRACTIONS = _spellings_without_apostrophes(_APOSTROPHE_WORDS)


def vqa_normalise(text: str) -> str:
    """The official VQA normalisation, as the TextVQA evaluator applies it.

    Lower case; commas and question marks dropped; other punctuation dropped where it touches a space and made a space
    elsewhere; periods dropped unless a digit follows (3.5 stays); number words to digits; articles dropped; missing
    apostrophes put back.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBER_WORDS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy min(humans who said it / 3, 1), averaged over leaving each human out in turn.

    Fewer than four answers are no vote: then any match scores 1 (GQA's single answer).
    """
    predicted = vqa_normalise(prediction)
    counts = Counter(vqa_normalise(answer) for answer in answers)
    said = counts[predicted]
    total = len(answers)
    if total < VOTES_FROM:
        return float(said > 0)
    # Leaving out one of the `said` humans who agree leaves said - 1; leaving out any other leaves said.
    return (said * min((said - 1) / 3, 1.0) + (total - said) * min(said / 3, 1.0)) / total


# --- one answer, any metric -------------------------------------------------------------------------------------------


def parse_answer(metric: str, text: str, choices: Sequence[str] = ()) -> str | None:
    """What ``metric`` takes the text to say; two answers agree when this is equal. None: it could not be read."""
    if metric == "yes_no":
        return pope_answer(text)
    if metric == "mme":
        return mme_answer(text)
    if metric == "choice":
        return choice_answer(text, choices)
    return vqa_normalise(text) if metric == "vqa" else normalise(text)


def score_answer(metric: str, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The score in [0, 1] of one prediction.

    ``references``: accepted answers (``vqa``: what the humans said; ``choice``: letters or texts).
    """
    if metric == "vqa":
        return vqa_accuracy(prediction, references)
    said = parse_answer(metric, prediction, choices)
    # A capital letter is the letter of an option here, even where it is the text of another one.
    letters = tuple(LETTERS) if metric == "choice" else ()
    right = {r if r in letters else parse_answer(metric, r, choices) for r in references}
    return float(said is not None and said in right)


def agrees(metric: str, one: str, other: str, choices: Sequence[str] = ()) -> bool:
    """Do two models say the same thing? Answers that cannot be read agree only when their text is equal."""
    said, also = parse_answer(metric, one, choices), parse_answer(metric, other, choices)
    return normalise(one) == normalise(other) if said is None or also is None else said == also


# --- numbers over a whole set -----------------------------------------------------------------------------------------


def yes_no_summary(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """POPE's numbers, with yes as the positive class; a ratio without a denominator is None.

    So precision is None where yes is never said, recall where it is never right, F1 where both hold.
    """
    said = [pope_answer(text) == "yes" for text in predictions]
    true = [pope_answer(text) == "yes" for text in references]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    right = sum(s == t for s, t in zip(said, true, strict=True))
    return {
        "accuracy": _ratio(right, len(said)),
        "precision": _ratio(hits, sum(said)),
        "recall": _ratio(hits, sum(true)),
        "f1": _ratio(2 * hits, sum(said) + sum(true)),
        "yes_ratio": _ratio(sum(said), len(said)),
        "unparsed": float(sum(not says_yes_or_no(text) for text in predictions)),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def mme_summary(scores: Sequence[float], images: Sequence[str]) -> dict[str, float]:
    """MME's numbers of one subtask: accuracy per question, acc+ per image (both questions right), 100·(acc + acc+).

    ValueError without a question.
    """
    if not scores:
        raise ValueError("MME's numbers need a question at least")
    by_image: dict[str, list[float]] = defaultdict(list)
    for score, image in zip(scores, images, strict=True):
        by_image[image].append(score)
    accuracy = sum(scores) / len(scores)
    plus = sum(min(pair) for pair in by_image.values()) / len(by_image)
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * (accuracy + plus)}


def mme_totals(subtask_scores: dict[str, float]) -> dict[str, float]:
    """Perception and cognition sums over the official subtasks present, and the sum of everything."""
    totals = {"total": sum(subtask_scores.values())}
    for name, subtasks in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        present = [subtask_scores[subtask] for subtask in subtasks if subtask in subtask_scores]
        if present:
            totals[name] = sum(present)
    return totals
