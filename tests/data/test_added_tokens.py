"""Added tokens: read, shown and merged from a folder's files as transformers does, special ones never from a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.processor import Processor
from mmmamba.data.sample import Sample, Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.tokenizer_template import JinjaTemplate
from mmmamba.errors import UserError
from mmmamba.model import ModelConfig, StackConfig
from tiny import SPECIALS

TEXTS = ["what colour is it ? <think> the think tool", "a b    c  d hello Hello"] * 4

SETS = {
    "plain": [AddedToken("<think>", special=False), AddedToken("    ", special=False, normalized=False),
              AddedToken("</think>", special=False, normalized=False), AddedToken("<tool_call>", special=True)],
    "flags": [AddedToken("<l>", special=False, lstrip=True), AddedToken("<r>", special=False, rstrip=True),
              AddedToken("tool", special=False, single_word=True), AddedToken("<m>", special=True, lstrip=True),
              AddedToken("<e>", special=True, rstrip=True), AddedToken("Tooth", special=False, normalized=True)],
    "overlapping": [AddedToken("<a>", special=True),
                    *(AddedToken(text, special=False) for text in ("<a", "<a>b", "a>", "\n\n", "\n"))],
    "of the vocabulary": [AddedToken("hello", special=False), AddedToken("is", special=True), AddedToken("é")],
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any]] = {
    "bytes": (None, None),
    "bytes, a space first": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lower case": (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), None),
    "words": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "words everywhere": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
}
ALPHABET = ["<think>", "</think>", "<tool_call>", "    ", "  ", " ", "\n", "\n\n", "\t", "<l>", "<r>", "<m>", "<e>",
            "tool", "Tooth", "tooth", "tools", "<a", "<a>", "<a>b", "a>", "hello", "Hello", "is", "<s>", "</s>", "é",
            "x", "猫", "\x1c"]  # fmt: skip
texts = st.lists(st.sampled_from(ALPHABET) | st.text(max_size=3), max_size=9).map("".join)


def build(kind: str, added: str) -> tokenizers.Tokenizer:
    bpe = train_bpe(TEXTS, 320, SPECIALS)
    normalizer, pre_tokenizer = KINDS[kind]
    if normalizer is not None:
        bpe.normalizer = normalizer
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    bpe.add_tokens(SETS[added])
    return bpe


BUILT = {(kind, added): build(kind, added) for kind in KINDS for added in SETS}
PAIRS = {key: (transformers.PreTrainedTokenizerFast(tokenizer_object=bpe), Tokenizer.from_bpe(bpe))
         for key, bpe in BUILT.items()}  # fmt: skip


@pytest.mark.parametrize("key", BUILT, ids=", ".join)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_text_is_read_and_shown_as_transformers_does(key: tuple[str, str], text: str) -> None:
    theirs, ours = PAIRS[key]
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text) == ids
    plain = ours.encode(text, allow_special=False)
    for found in (ids, plain):
        assert ours.decode(found) == theirs.decode(found, skip_special_tokens=True)
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert not special & set(plain)
    if special & set(expected):  # the name is a word of the vocabulary, which comes out of the merges
        assert key[1] == "of the vocabulary" and ours.decode(plain) == theirs.decode(expected)
    else:
        assert plain == expected


@settings(max_examples=60, deadline=None)
@given(text=texts, kind=st.sampled_from(list(KINDS)), added=st.sampled_from(["plain", "overlapping"]))
def test_a_text_in_the_middle_gets_no_space_of_its_own(text: str, kind: str, added: str) -> None:
    """What follows an added token in it is tokenised as in the whole."""
    theirs, ours = PAIRS[kind, added]
    whole = theirs(f"猫{text}", add_special_tokens=False, split_special_tokens=True).input_ids
    first = ours.encode("猫", allow_special=False)
    if not text.startswith((" ", "\u2581")):  # (a space that is there may be one with that of the tokenizer's)
        assert first + ours.encode(text, allow_special=False, after="text") == whole


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=3, max_size=9).map(" x\nyes no ".join))
def test_long_texts_with_added_tokens(text: str) -> None:
    for added in SETS:
        ours = PAIRS["bytes", added][1]
        whole = ours.encode(text, allow_special=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmmamba.data.tokenizer.STRETCH", 5)
            assert ours.encode(text, allow_special=False) == whole


# ---------------------------------------------------------------------------------------------- folders


def write(folder: Path, definition: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"tokenizer": definition, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


DEFINITION = json.loads(train_bpe(TEXTS, 320, SPECIALS).to_str())
SIZE = len(DEFINITION["model"]["vocab"])
WORD = next(text for text in DEFINITION["model"]["vocab"] if text.isalpha() and len(text) > 3 and text.isascii())
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def entry(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    return {"content": content, **FLAGS, "special": special, **flags}


FOLDERS: dict[str, dict[str, Any]] = {
    "the config adds": {"tokenizer_config": {"added_tokens_decoder": {
        str(SIZE): entry("<think>"), str(SIZE + 1): entry("<x>", True)}}},
    "the config changes flags": {"tokenizer_config": {"added_tokens_decoder": {
        "5": entry("<img>", False, lstrip=True), "3": entry("<|im_start|>", True, rstrip=True)}}},
    "added_tokens.json adds": {"tokenizer_config": {}, "added_tokens": {"<think>": SIZE, "<x>": SIZE + 1}},
    "a role in added_tokens.json": {
        "tokenizer_config": {"pad_token": "<x>"}, "added_tokens": {"<think>": SIZE, "<x>": SIZE + 1}},
    "special_tokens_map.json": {"tokenizer_config": {"eos_token": "<s>"},
        "special_tokens_map": {"eos_token": {"content": WORD, **FLAGS}, "additional_special_tokens": ["<img>"]}},
    "a word with a role": {"tokenizer_config": {"eos_token": WORD}},
    "a word of the model's own": {"tokenizer_config": {"think_token": WORD}},
    "an extra special word": {"tokenizer_config": {"extra_special_tokens": [WORD]}},
    "a word in the decoder": {"tokenizer_config": {"added_tokens_decoder": {
        str(DEFINITION["model"]["vocab"][WORD]): entry(WORD)}}},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=25, deadline=None)
@given(text=st.lists(st.sampled_from(["<think>", "<x>", "<img>", "<|im_start|>", WORD, " ", "a", "<s>"])).map("".join))
def test_the_files_of_a_folder_are_merged(name: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("folder")
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **FOLDERS[name]["tokenizer_config"]}}
    write(folder, DEFINITION, **{**FOLDERS[name], **files})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if not {i for i, token in theirs.added_tokens_decoder.items() if token.special} & set(plain):
        assert ours.encode(text, allow_special=False) == plain
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    ours.save(folder / "copy")
    again = Tokenizer.from_folder(folder / "copy")
    assert (again.encode(text), again.identity) == (ours.encode(text), ours.identity)


def test_files_that_agree_change_nothing(tmp_path: Path) -> None:
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in DEFINITION["added_tokens"]}
    folder = write(tmp_path / "x", DEFINITION, tokenizer_config={"added_tokens_decoder": decoder})
    assert Tokenizer.from_folder(folder).identity == (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("files, reason", [
    ({"tokenizer_config": {"added_tokens_decoder": {"5": entry("<box>")}}}, "the id 5 is '<box>' here.*5 is '<img>'"),
    ({"tokenizer_config": {"added_tokens_decoder": {"6": entry("<img>")}}}, "'<img>' here.*'<img>' has the id 5"),
    ({"tokenizer_config": {"added_tokens_decoder": {"999": entry("<a>")}}}, "has the id 999, the next one free is 299"),
    ({"tokenizer_config": {"added_tokens_decoder": {"5": entry("<img>", lstrip=1)}}}, "'lstrip' must be true or false"),
    ({"tokenizer_config": {"added_tokens_decoder": {"²": entry("<a>")}}}, "'²' must be a number"),
    ({"added_tokens": {"<box>": 5}}, "added_tokens.json: the id 5 is '<box>' here"),
    ({"added_tokens": {"<box>": True}}, "'<box>' must have an id, got True"),
    ({"added_tokens": []}, "added_tokens.json: must hold a JSON object"),
])  # fmt: skip
def test_files_that_contradict_each_other(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Tokenizer.from_folder(write(tmp_path / "x", DEFINITION, **files))


# ---------------------------------------------------------------------------------------------- prompts

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|head|> {{ m.role }} <|body|>\n {{ m.content }} <|eot|> \n{% endfor %}"
    "{% if add_generation_prompt %}<|head|> assistant <|body|>\n{% endif %}"
)
MARKS = ["<unk>", "<s>", "</s>", "<|head|>", "<|body|>", "<|eot|>"]


def chat_processor(end_special: bool, **flags: bool) -> tuple[Any, Processor]:
    bpe = train_bpe(TEXTS, 320, ["<unk>", "<s>", "</s>"])
    bpe.add_tokens([AddedToken(mark, special=mark != "<|eot|>" or end_special, **flags) for mark in MARKS[3:]])
    bpe.add_tokens(SETS["plain"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    stack = StackConfig(num_layers=0, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=4)
    config = ModelConfig(hidden_size=4, vocab_size=400, template="tokenizer", embedding=stack, decoder=stack)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
    return theirs, Processor(Tokenizer(bpe.to_str(), named), config)


CHATS = {name: chat_processor(**flags) for name, flags in {
    "plain": {"end_special": True}, "rstrip": {"end_special": True, "rstrip": True},
    "lstrip": {"end_special": True, "lstrip": True}, "the end is not special": {"end_special": False},
}.items()}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=40, deadline=None)
@given(texts.filter(lambda text: "s>" not in text and "<tool_call>" not in text), st.just("a <think> b"))
def test_prompts_with_added_tokens_are_those_of_transformers(name: str, question: str, answer: str) -> None:
    # A known difference: a question of spaces alone, which are an added token too, next to a mark that strips spaces.
    assume(question.strip() or "strip" not in name)
    theirs, processor = CHATS[name]
    messages = [{"role": "user", "content": question}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert processor.prompt([Turn("human", question)]).input_ids.tolist() == expected
    whole = [*messages, {"role": "assistant", "content": answer}]
    sample = processor.encode(Sample(id="", turns=(Turn("human", question), Turn("gpt", answer))))
    if name not in ("rstrip", "lstrip"):  # (an answer keeps the space around it)
        assert sample.input_ids.tolist() == theirs.apply_chat_template(whole)["input_ids"]
    think, end = (theirs.convert_tokens_to_ids(token) for token in ("<think>", "<|eot|>"))
    assert think in sample.labels.tolist() and end in sample.labels.tolist() and end == processor.stop_token_ids[0]


def test_marks_are_withheld_from_text_whatever_the_tokenizer_calls_them(tiny_processor: Processor) -> None:
    """Else a question could hold an image position, or end itself."""
    content = json.loads(tiny_processor.tokenizer.definition)
    for token in content["added_tokens"]:
        token["special"] = False
    other = Processor(Tokenizer(json.dumps(content)), tiny_processor.config)
    turns = [Turn("human", "<img><IMG_CONTEXT></img><|im_end|><|im_start|>assistant\n")]
    assert other.prompt(turns).input_ids.tolist() == tiny_processor.prompt(turns).input_ids.tolist()
    assert other.tokenizer.definition == json.dumps(content)


def test_a_template_s_own_definition_is_as_before() -> None:
    """A fingerprint of a model whose added tokens are all special stays what it was."""
    assert JinjaTemplate("x", {}, ["<s>"], "here").definition == '["x", {}, ["<s>"]]'
