"""Streaming text never shows half a character and loses nothing."""

from __future__ import annotations

import random

import pytest

from mmmamba.data.processor import Processor
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.inference.detokenizer import Detokenizer, StopStrings


def pieces_of(decode, ids):
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize(
    "text", ["plain words, 123", "naïve café", "你好，世界", "a 👩‍👩‍👧 b 🇫🇷", "\u00a0x\n\ty  ", ""]
)
def test_characters_come_whole(tiny_processor: Processor, text: str):
    tokenizer: Tokenizer = tiny_processor.tokenizer
    ids = tokenizer.encode(text, allow_special=False)
    pieces = pieces_of(tiny_processor.decode, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_between_are_silent(tiny_processor: Processor):
    end = tiny_processor.tokenizer.token_id("<|im_end|>")
    ids = tiny_processor.tokenizer.encode("ab", allow_special=False)
    assert "".join(pieces_of(tiny_processor.decode, [end, ids[0], end, end, *ids[1:], end])) == "ab"


def test_any_bytes_give_the_text_of_the_whole(tiny_processor: Processor):
    random_ids = random.Random(0)
    for _ in range(50):
        ids = [random_ids.randrange(320) for _ in range(40)]
        assert "".join(pieces_of(tiny_processor.decode, ids)) == tiny_processor.decode(ids)


def test_a_character_cut_off_at_the_end_is_still_flushed(tiny_processor: Processor):
    ids = tiny_processor.tokenizer.encode("x你", allow_special=False)[:-1]
    pieces = pieces_of(tiny_processor.decode, ids)
    assert pieces[0] == "x" and "".join(pieces) == tiny_processor.decode(ids)


def test_decoders_that_strip_the_first_space_keep_the_spaces_between():
    words = {1: "▁the", 2: "▁cat", 3: "s", 4: "▁sat"}  # as sentencepiece decoders do

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert pieces_of(decode, [1, 2, 3, 4]) == ["the", " cat", "s", " sat", ""]


def through(strings: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stops = StopStrings(strings)
    return [*(stops.push(piece) for piece in pieces), stops.flush()], stops.found


def cut(text: str, strings: list[str]) -> tuple[str, bool]:
    """Character by character: the text before the first string that is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_strings_are_found_wherever_the_pieces_are_cut():
    chance = random.Random(1)
    for _ in range(2000):
        text = "".join(chance.choices("ab你", k=chance.randrange(14)))
        strings = ["".join(chance.choices("ab你", k=chance.randrange(1, 5))) for _ in range(chance.randrange(4))]
        borders = sorted(chance.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]
        shown, found = through(strings, pieces)
        assert ("".join(shown), found) == cut(text, strings), (pieces, strings)


def test_only_what_may_begin_a_stop_string_is_held_back():
    assert through(["END"], ["so E", "N", "T EN", "D?", "more"]) == (["so ", "", "ENT ", "", "", ""], True)
    assert through(["END"], ["so E", "N"]) == (["so ", "", "EN"], False)
    assert through([], ["so", " E"]) == (["so", " E", ""], False)
    assert through(["\n\n", "b\n"], ["a\n", "b", "\nc"]) == (["a", "\n", "", ""], True)
