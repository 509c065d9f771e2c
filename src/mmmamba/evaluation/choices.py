"""Which option an answer to a multiple-choice question chooses.

The published sets read answers in ways that differ in detail. What is done here is what they have in common, and where
they differ, the reading that takes nothing for an answer that is none:

- ScienceQA (``run_gpt3.py`` of its repository) takes the letter in "The answer is X."; LLaVA's script for the same set
  also takes a letter alone and the letter of "X. text".
- MMBench (``can_infer`` in VLMEvalKit) takes the one capital letter that is a separate word, and doubts an
  "A" in a sentence, which may be an article; else it takes the one option whose text the answer holds.
- MMMU (``parse_multi_choice_response`` of its repository) takes a letter in brackets, else a capital letter between
  spaces, else the option whose text a longer answer holds.
- SEED-Bench ranks the options by likelihood; a generated answer is read as a letter (LLaVA's script for the set).

ScienceQA and MMMU draw an option at random for an answer that can't be read. That is not done here: such an answer
chooses nothing, is wrong, and is counted as ``unparsed``. Where two letters are named, MMMU takes the last; here, as in
MMBench, neither is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Without the options' texts an answer may choose one of these: no published set has more than ten options.
_LETTERS_ALONE = LETTERS[:10]

_WRAPPED = " \t\n\r*_`\"“”'‘’[]{}<>$"  # what a model may put around a whole answer
_LEADING = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|$)|$)")
_BOXED = re.compile(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}")  # LaTeX around an answer
_ANSWER = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)\s*", re.IGNORECASE)
_OPTION = re.compile(r"\b(?:option|choice)\s+(?=\(?[A-Za-z]\b)", re.IGNORECASE)
# What a stated letter may be followed by. A word there makes it part of a text ("B cells", "a mixture", "I think").
_AFTER = r"(?=\s*(?:$|[.,;:!?)\]\n(—–-](?!\w)|\(|(?:because|since|as|for|which|and|or|but|is|are)\b))"
_CAPITAL = re.compile(rf"\(?\**([A-Z])\b(?!['’])\**\)?{_AFTER}")
_SMALL = re.compile(r"\(([a-z])\)|([a-z])(?=\s*(?:$|[.)](?:\s|$)))")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_LONE = re.compile(rf"(?<![\w'’])([A-Z])\b(?!['’]){_AFTER}")
_NOT = re.compile(r"(?:\bnot|n['’]t|\bnor|\bneither)\s+(?:(?:a|an|the|option)\s+)*\(?$", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:a|an|the)\s+")
_POLAR = {"yes", "no", "true", "false"}


def normalise(text: str) -> str:
    """Lower case, inner white space collapsed, no trailing period."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def choice_answer(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer chooses, or None when it names none, several or one not on offer.

    An option's own text wins over a letter ("C. elegans", "a mixture"), wherever the answer is that text, states it
    ("The answer is a mixture") or begins with it. Then come the letters: "B", "(b)", "B. text", "The answer is B",
    "option B", and the one capital letter that is a separate word. Last comes the one option whose text is
    in the answer. "A" and "I" before a word are English.

    Args:
        text: what was said.
        choices: the options' texts; without them any letter from A to J may be chosen, and texts are not understood.
    """
    text = _BOXED.sub(r"\1", text).strip()
    letters = LETTERS[: len(choices)] if choices else _LETTERS_ALONE
    options = dict(zip(letters, choices, strict=False))
    bare = text.strip(_WRAPPED)
    if (found := _whole(text, options) or _whole(bare, options)) is not None:
        return found
    rest = [text[match.end() :].strip().strip(_WRAPPED) for match in _ANSWER.finditer(text)]
    held, left = _held(text, options)
    if len(said := {found for part in rest if (found := _stated_text(part, options))}) == 1:
        return said.pop()
    if (found := _begins(bare, options, held)) is not None:
        return found
    leading = _LEADING.match(bare)
    if leading:
        return _on_offer({leading[1].upper()}, letters)
    if stated := {letter for part in rest if (letter := _stated_letter(part))} | _named_options(text):
        return _on_offer(stated, letters)
    lone = {match[1] for match in _BRACKETED.finditer(left) if not _denied(left, match.start())} or {
        match[1] for match in _LONE.finditer(left) if not _denied(left, match.start())
    }
    lone &= set(letters)
    if len(lone) == 1 and (len(held) != 1 or held == lone):
        return lone.pop()
    return held.pop() if len(held) == 1 and not lone else None


def _denied(text: str, at: int) -> bool:
    """Whether what begins at ``at`` is said not to be the answer ("not a cat", "neither A")."""
    return _NOT.search(text[max(0, at - 40) : at]) is not None


def _on_offer(found: set[str], letters: str) -> str | None:
    return next(iter(found)) if len(found) == 1 and found <= set(letters) else None


def _whole(text: str, options: dict[str, str]) -> str | None:
    """The option that ``text`` is: to the letter, else but for case and a final period, else but for an article."""
    for same in (lambda t: t.strip(), normalise, lambda t: _ARTICLE.sub("", normalise(t))):
        found = [letter for letter, option in options.items() if same(text) and same(option) == same(text)]
        if len(found) == 1:
            return found[0]
        if found:
            return None
    return None


def _stated_text(part: str, options: dict[str, str]) -> str | None:
    """The option whose text follows "the answer is", to the end or to the end of the sentence."""
    sentence = re.split(r"[\n;]|\.\s|,?\s+because\b", part, maxsplit=1)[0]
    for piece in (part, sentence):
        if (found := _whole(piece.strip(_WRAPPED), options)) is not None:
            return found
    inside = {letter for letter in _held(sentence, options)[0] if len(options[letter].strip()) > 1}
    begun = [letter for letter in inside if _starts_with(sentence, options[letter])]
    return begun[0] if len(inside) == 1 and begun else None


def _begins(text: str, options: dict[str, str], held: set[str]) -> str | None:
    """The option that an answer opens with, where it holds no other or a sentence ends there."""
    begun = [o for o in options if len(normalise(options[o])) > 1 and _starts_with(text, options[o])]
    if not begun:
        return None
    longest = max(begun, key=lambda letter: len(normalise(options[letter])))
    if sum(normalise(options[o]) == normalise(options[longest]) for o in options) > 1:
        return None
    after = " ".join(text.lower().split())[len(normalise(options[longest])) :]
    ends = ".;:!" + ("," if normalise(options[longest]) in _POLAR else "")
    return longest if held == {longest} or after[:1] in tuple(ends) else None


def _starts_with(text: str, option: str) -> bool:
    said, option = " ".join(text.lower().split()), normalise(option)
    return bool(option) and re.match(re.escape(option) + r"(?![\w]|[.,/]\d)", said) is not None


def _stated_letter(part: str) -> str | None:
    """The letter that follows "the answer is"."""
    part = _OPTION.sub("", part, count=1) if _OPTION.match(part) else part
    if capital := _CAPITAL.match(part):
        return capital[1]
    small = _SMALL.match(part)
    return (small[1] or small[2]).upper() if small else None


def _named_options(text: str) -> set[str]:
    """The letters of "option B" and "choice (c)"."""
    found = set()
    for match in _OPTION.finditer(text):
        rest = text[match.end() :]
        small = re.match(r"[b-hj-z]\b", rest)  # "a" and "i" may be words even here
        letter = small[0].upper() if small else _stated_letter(rest)
        if letter is not None and not _denied(text, match.start()):
            found.add(letter)
    return found


def _held(text: str, options: dict[str, str]) -> tuple[set[str], str]:
    """The letters of the options whose text occurs in ``text`` as words, and what is left of ``text`` without them.

    An option's text inside a longer one doesn't count.
    """
    said = " ".join(text.split())
    spans: list[tuple[int, int, str]] = []
    for letter, option in options.items():
        words = normalise(option)
        if len(words) < 2 and not words.isdecimal():
            continue  # a single letter is no text that a sentence would hold
        found = re.compile(rf"(?<![\w/−-])(?<!\d[.,]){re.escape(words)}(?![\w/]|[.,]\d)", re.IGNORECASE)
        for match in found.finditer(said):
            if not _denied(said, match.start()):
                spans.append((match.start(), match.end(), letter))
    widest = [
        (start, end, letter) for start, end, letter in spans
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b, _ in spans)
    ]  # fmt: skip
    for start, end, _ in sorted(widest, reverse=True):
        said = f"{said[:start]}{'_' * (end - start)}{said[end:]}"
    return {letter for *_, letter in widest}, said
