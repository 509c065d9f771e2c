"""Byte-level BPE: every text comes back, and text never becomes a special token."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.data.bpe_training import SPECIALS, train_bpe
from mmmamba.data.tokenizer import MAX_STRETCH, Tokenizer
from mmmamba.errors import UserError

TEXTS = ["What colour is the cat?", "How many red circles are there? 12", "图里有什么？"] * 4
TOKENIZER = Tokenizer.from_bpe(train_bpe(TEXTS, 300))
SPECIAL_IDS = set(range(len(SPECIALS)))


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text, allow_special=False)
    assert TOKENIZER.decode(ids) == text
    assert not SPECIAL_IDS.intersection(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "<", "|im_end|>", "猫", "🎉", "7", "\n"])).map("".join))
def test_special_tokens_are_plain_in_plain_text(text):
    plain, special = TOKENIZER.encode(text, allow_special=False), TOKENIZER.encode(text)
    assert not SPECIAL_IDS.intersection(plain)
    assert TOKENIZER.decode(plain) == text
    assert TOKENIZER.decode(special, skip_special=False) == text


def test_a_long_text_is_tokenised_in_stretches(monkeypatch):
    """They end between words only, and the ids are those of the whole."""
    text = " ".join([*TEXTS, "a b\nc  d \n e.\nf it's x_y", "图里有什么"] * 40)
    across = train_bpe(["tea tea", "a b a b"] * 9, 300)
    across.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    crossing = Tokenizer(_with_token(across.to_str(), "aĠ"))
    for tokenizer, cut in ((TOKENIZER, True), (crossing, False)):
        whole = tokenizer.encode(text, allow_special=False)
        monkeypatch.setattr("mmmamba.data.tokenizer.STRETCH", 20)
        stretches = list(tokenizer._stretches(text))
        assert "".join(stretches) == text and (len(stretches) > 100) == cut
        assert all(a[-1].isalpha() and b[0] in " \n" for a, b in pairwise(stretches))
        assert tokenizer.encode(text, allow_special=False) == whole
        assert tokenizer.encode("图" * 999, allow_special=False) == tokenizer.encode("图", allow_special=False) * 999
        monkeypatch.undo()


def _with_token(definition: str, token: str) -> str:
    """A definition in which two neighbours of ``token`` are merged into it."""
    content = json.loads(definition)
    content["model"]["vocab"][token] = 1 + max(content["model"]["vocab"].values())
    content["model"]["merges"].append(list(token))
    return json.dumps(content)


def test_specials_have_the_first_ids():
    assert [TOKENIZER.token_id(token) for token in SPECIALS] == list(range(8))
    assert TOKENIZER.encode("<s>a</s>")[0] == 1 and TOKENIZER.encode("<s>a</s>")[-1] == 2
    assert TOKENIZER.decode([1, *TOKENIZER.encode("a"), 4]) == "a"


def test_digits_stand_alone():
    assert len(TOKENIZER.encode("1234")) == 4


def test_training_learns_and_repeats():
    assert TOKENIZER.vocab_size == 300
    assert len(TOKENIZER.encode("What colour is the cat?")) < 23
    assert train_bpe(TEXTS, 300).to_str() == TOKENIZER.definition


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="256 bytes and 8 specials take 264"):
        train_bpe(TEXTS, 263)


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "a")
    Tokenizer.from_folder(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<s>", "</s>", "</s>")
    assert Tokenizer.from_folder(tmp_path / "b").encode("cat 12 <s>") == TOKENIZER.encode("cat 12 <s>")


def test_transformers_reads_what_is_saved(tmp_path):
    import transformers

    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhat colour? 猫<|im_end|>"
    assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_pickling_keeps_plain_text_plain():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode("<s>", allow_special=False) == TOKENIZER.encode("<s>", allow_special=False) != [1]


def test_unknown_token():
    with pytest.raises(UserError, match="no token '<box>'"):
        TOKENIZER.token_id("<box>")


@pytest.mark.parametrize("files, reason", [
    ({}, "no tokenizer.json and no tokenizer.model$"),
    ({"tokenizer.model": ""}, "tokenizer.model: not a sentencepiece model: it has no pieces"),
    ({"tokenizer.json": "{"}, "tokenizer.json: not a usable tokenizer definition"),
    ({"tokenizer.json": "[]"}, "tokenizer.json: not a usable tokenizer definition"),
    ({"tokenizer.json": "{}"}, "tokenizer.json: not a usable tokenizer definition"),
    ({"tokenizer.json": TOKENIZER.definition, "tokenizer_config.json": "{"}, "tokenizer_config.json:1: not JSON"),
    ({"tokenizer.json": TOKENIZER.definition, "tokenizer_config.json": "[]"}, "must hold a JSON object"),
])  # fmt: skip
def test_bad_folders(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        Tokenizer.from_folder(tmp_path)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@pytest.mark.parametrize("normalizer, pre_tokenizer, spaced", [
    (None, METASPACE, {"start"}),
    (None, {**METASPACE, "prepend_scheme": "always"}, {"start", "special"}),
    (None, {**METASPACE, "prepend_scheme": "never"}, set()),
    (PREPEND, None, {"start", "special"}),
    (PREPEND["normalizers"][0], None, {"start", "special"}),
    (None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
     {"start", "special"}),
    (None, {"type": "Sequence", "pretokenizers": [METASPACE]}, {"start"}),
])  # fmt: skip
def test_the_space_before_a_text_goes_where_one_call_would_put_it(normalizer, pre_tokenizer, spaced):
    """A prompt is tokenised stretch by stretch; a tokenizer of the sentencepiece kind must not see that."""
    letters = ["<s>", "▁", "Ġ", "a", "b", "▁a", "Ġa"]
    definition = {
        "added_tokens": [{"id": 0, "content": "<s>", "special": True, "normalized": False, "single_word": False,
                          "lstrip": False, "rstrip": False}],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(letters)},
                  "merges": [["▁", "a"], ["Ġ", "a"]]},
    }  # fmt: skip
    tokenizer = Tokenizer(json.dumps(definition))
    for after in ("start", "special", "text"):
        first = letters[tokenizer.encode("ab", allow_special=False, after=after)[0]]
        assert (first != "a") == (after in spaced), after
    whole = tokenizers.Tokenizer.from_str(json.dumps(definition))
    pieces = [*tokenizer.encode("ab", False), 0, *tokenizer.encode("ab", False, after="special")]
    assert whole.encode("ab<s>ab", add_special_tokens=False).ids == pieces


def test_a_word_without_end_is_refused_before_it_takes_the_memory():
    for text in ("x" * (MAX_STRETCH + 1), "a b " * 20_000 + "1 " * MAX_STRETCH):
        with pytest.raises(UserError, match=r"characters without the end of a word .* at most 1,048,576"):
            TOKENIZER.encode(text, allow_special=False)
        with pytest.raises(UserError, match="characters without the end of a word"):
            TOKENIZER.encode(text)


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}},  # the library panics
    {"model": {"type": "WordLevel", "vocab": {"<s>": 0}, "unk_token": "gone"}},
])  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
def test_a_definition_that_fails_at_a_text_is_named(changes, special):
    definition = json.loads(TOKENIZER.definition) | {"added_tokens": [], "post_processor": None} | changes
    tokenizer = Tokenizer(json.dumps(definition), where="here")
    with pytest.raises(UserError, match="here: the tokenizer fails at this text"):
        tokenizer.encode("What colour is it?", allow_special=special)


@pytest.mark.parametrize("normalizer", [["NFC"], [[]], ["_"], [[{"type": "NFC"}]]])
def test_a_part_of_a_definition_that_is_no_mapping_is_refused(normalizer):
    definition = json.loads(TOKENIZER.definition) | {"normalizer": normalizer}
    with pytest.raises(UserError, match="here: not a usable tokenizer definition"):
        Tokenizer(json.dumps(definition), where="here")
