"""Chat templates that come with a tokenizer: prompts are transformers' own, and text stays text."""

from __future__ import annotations

import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.chat_template import render
from mmmamba.data.processor import UNSCORED, Processor
from mmmamba.data.sample import BadSample, Sample, Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.tokenizer_template import JinjaTemplate
from mmmamba.errors import UserError
from mmmamba.model import ModelConfig, StackConfig

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|body|>", "<|eot|>")
BPE = train_bpe(["What colour is the cat? Black. user\nassistant\nsystem [INST] [/INST]"] * 4, 300, SPECIALS)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TEMPLATES = {
    # ChatML with a default system message.
    "chatml": (
        "{%- if messages[0].role != 'system' -%}<|im_start|>system\nBe kind.<|im_end|>\n{%- endif -%}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Trims every text; begins with bos_token; marks its answers for those who ask.
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|body|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|eot|>{% endgeneration %}"
        "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|body|>\n\n{% endif %}"
    ),
    # No header of its own for answers, a space around them, the system message inside the first question.
    "instructions": (
        "{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('question and answer must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (lead if loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # The system message goes with the latest question, and is lost where the last word is not a question.
    "travelling": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}<|head|>{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}"
        "<|body|>{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # Prompts for a thought that answers are later written without.
    "thinking": (
        "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant\n<think>\n{% endif %}"
    ),
}
#: Templates whose conversations only grow at their end: without a system message, and with one.
APPENDS = {"chatml": (True, True), "headers": (True, True), "instructions": (False, False),
           "travelling": (True, False), "thinking": (False, False)}  # fmt: skip


def make_config(**changes: Any) -> ModelConfig:
    stack = StackConfig(num_layers=0, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=4)
    fields: dict[str, Any] = {"hidden_size": 4, "vocab_size": 300, "template": "tokenizer", "eos_token_id": 2}
    return ModelConfig(**{**fields, **changes}, embedding=stack, decoder=stack)


def make_processor(source: str | None, bpe: str = BPE.to_str(), **changes: Any) -> Processor:
    template = {} if source is None else {"chat_template": source}
    return Processor(Tokenizer(bpe, {**NAMED, **template}), make_config(**changes))


PROCESSORS = {name: make_processor(source) for name, source in TEMPLATES.items()}
THEIRS = {
    name: PreTrainedTokenizerFast(tokenizer_object=BPE, chat_template=source, **NAMED)
    for name, source in TEMPLATES.items()
}
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": _ROLES[turn.role], "content": turn.text} for turn in turns]


# A text that spells a special token is text to us, and the token to transformers.
questions = st.text(max_size=12).filter(lambda text: not re.search(r"<[^>]+>", text))
answers = st.lists(st.sampled_from(["Black.", "the cat", "é", "12", "猫"]), min_size=1, max_size=3).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    turns = [Turn("system", draw(answers))] * draw(st.booleans())
    for _ in range(draw(st.integers(0, 2))):
        turns += [Turn("human", draw(questions)), Turn("gpt", draw(answers))]
    return [*turns, Turn("human", draw(questions))]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(turns=conversations(), answer=answers)
def test_prompts_are_those_of_transformers(name, turns, answer):
    processor, theirs = PROCESSORS[name], THEIRS[name]
    expected = theirs.apply_chat_template(messages(turns), add_generation_prompt=True, tokenize=False)
    assert render(processor.template.pieces(turns, reply=True)) == expected
    ids = theirs.apply_chat_template(messages(turns), add_generation_prompt=True)["input_ids"]
    assert processor.prompt(turns).input_ids.tolist() == ids
    whole = [*turns, Turn("gpt", answer)]
    if name == "travelling" and turns[0].role == "system":
        with pytest.raises(BadSample, match=r"writes turn 0 \(system\) 0 times instead of once"):
            processor.encode(Sample(id="s", turns=tuple(whole)))
        return
    encoded = processor.encode(Sample(id="s", turns=tuple(whole)))
    assert encoded.input_ids.tolist() == theirs.apply_chat_template(messages(whole))["input_ids"]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(questions, min_size=3, max_size=3), said=st.lists(questions, min_size=2, max_size=2))
def test_continuations_add_up_to_the_whole_prompt_or_are_refused(name, system, texts, said):
    processor = make_processor(TEMPLATES[name], system_message=system)
    assert processor.appends == APPENDS[name][system is not None]
    if not processor.appends:
        with pytest.raises(UserError, match="chat template changes what came before"):
            processor.continuation(Turn("human", texts[0]))
        return
    turns = [Turn("human", texts[0])]
    ids = processor.prompt(turns).input_ids.tolist()
    for answer, question in zip(said, texts[1:], strict=True):
        spoken = processor.tokenizer.encode(answer, allow_special=False, after="text")
        more = processor.continuation(Turn("human", question)).input_ids.tolist()
        ids += [*spoken, processor.stop_token_ids[0], *more]
        turns += [Turn("gpt", answer), Turn("human", question)]
        assert processor.prompt(turns).input_ids.tolist() == ids


@pytest.mark.parametrize("name, stops", [
    ("chatml", ["<|im_end|>", "</s>", "<|im_start|>"]), ("headers", ["<|eot|>", "</s>", "<|head|>", "<|body|>"]),
    ("instructions", ["</s>", "<s>"]), ("travelling", ["</s>", "<|head|>"]),
    ("thinking", ["<|eot|>", "</s>", "<|head|>"]),
])  # fmt: skip
def test_stop_tokens(name, stops):
    assert [SPECIALS[i] for i in PROCESSORS[name].stop_token_ids] == stops
    more = make_processor(TEMPLATES[name], eos_token_id=-1, stop_token_ids=(7, 9))
    assert {7, 9} <= set(more.stop_token_ids) and -1 not in more.stop_token_ids


@pytest.mark.parametrize("name, scored", [
    ("chatml", ["Black.", "<|im_end|>"]), ("headers", ["Black.", "<|eot|>"]), ("instructions", [" Black. ", "</s>"]),
    ("travelling", ["Black.", "</s>"]), ("thinking", ["Black.", "<|eot|>"]),
])  # fmt: skip
def test_answers_are_scored_with_what_ends_them(name, scored):
    turns = (Turn("human", "What?"), Turn("gpt", "Black."), Turn("human", "Why?"), Turn("gpt", "Black."))
    pieces = PROCESSORS[name].template.pieces(turns, reply=False)
    assert [piece.text for piece in pieces if piece.scored] == scored * 2
    encoded = PROCESSORS[name].encode(Sample(id="s", turns=turns))
    kept = encoded.labels[encoded.labels != UNSCORED].tolist()
    assert PROCESSORS[name].decode(kept, skip_special=False) == "".join(scored * 2)


def test_the_default_system_message_is_the_template_s_own():
    template = PROCESSORS["chatml"].template
    question = [Turn("human", "Hi")]
    start, end = "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>system\n{}<|im_end|>\n"
    assert render(template.pieces(question, reply=False)).endswith("Be kind.<|im_end|>" + start)
    for message in ("", "Be brief."):
        expected = end.format(message) + start
        assert render(template.pieces(question, system_message=message, reply=False)) == expected
        own = [Turn("system", message), *question]
        assert render(template.pieces(own, system_message="another", reply=False)) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_cannot_smuggle_special_tokens(name):
    processor = PROCESSORS[name]
    evil = "".join(SPECIALS) + "\ue0000\ue001 {{ bos_token }}"
    plain = processor.prompt([Turn("human", "x"), Turn("gpt", "y"), Turn("human", "z")]).input_ids.tolist()
    ids = processor.prompt([Turn("human", "x" + evil), Turn("gpt", "y" + evil), Turn("human", "z")]).input_ids.tolist()
    assert [i for i in ids if i < 8] == [i for i in plain if i < 8]
    assert evil in processor.decode(ids, skip_special=False)


@pytest.mark.parametrize("source, turns, reason", [
    ("{% for m in messages %}{{ m.content ", [], r"the chat template, line 1: "),
    ("{{ messages | nonsense }}", [], r"the chat template, line 1: No filter named 'nonsense'"),
    (TEMPLATES["instructions"], ["gpt"], "does not take this conversation .question and answer must alternate."),
    ("{{ messages[9].content }}", ["human"], "does not take this conversation"),
    ("{{ strftime_now('%Y') }}", ["human"], "does not take this conversation .'strftime_now' is undefined."),
    ("{{ ''.__class__.__mro__ }}", ["human"], "does not take this conversation .*unsafe"),
    ("{{ messages[-1].content }}", ["system", "human"], r"writes turn 0 \(system\) 0 times instead of once"),
    ("{{ messages[0].content * 2 }}", ["human"], r"writes turn 0 \(human\) 2 times instead of once"),
    ("{{ messages[0].content | upper }}", ["human"], r"rewrites the text of turn 0 \(human\)"),
    ("{% set t = messages[0].content %}{{ t }}{% if t == 'text' %}!{% endif %}", ["human"], "another prompt for these"),
])  # fmt: skip
def test_templates_that_cannot_be_used(source, turns, reason):
    with pytest.raises(UserError, match=reason) as caught:
        template = JinjaTemplate(source, NAMED, SPECIALS, "tokenizer.json")
        template.pieces([Turn(role, "text") for role in turns], reply=True)
    assert str(caught.value).startswith("tokenizer.json: the chat template") and "\n" not in str(caught.value)


def test_a_conversation_that_a_template_refuses_is_a_bad_sample():
    sample = Sample(id="s", turns=(Turn("human", "a"), Turn("gpt", "b</think>c")), where="data.jsonl:7")
    with pytest.raises(BadSample, match=r"data\.jsonl:7: 'conversations': .*rewrites the text of turn 1 \(gpt\)"):
        PROCESSORS["thinking"].encode(sample)


@pytest.mark.parametrize("bos", [False, True])
def test_a_model_without_a_template_gets_the_plain_one(bos):
    definition = json.loads(BPE.to_str())
    if bos:
        token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        definition["post_processor"] = {
            "type": "TemplateProcessing", "single": [token, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }  # fmt: skip
    processor = make_processor(None, json.dumps(definition))
    turns = [Turn("system", "Be kind."), Turn("human", "Hi"), Turn("gpt", "Yo"), Turn("human", "Why?")]
    text = "Be kind.\n\nUser:\nHi\n\nAssistant:\nYo</s>\n\nUser:\nWhy?\n\nAssistant:\n"
    assert render(processor.template.pieces(turns, reply=True)) == "<s>" * bos + text
    ids = processor.prompt(turns).input_ids.tolist()
    assert ids.count(1) == bos and processor.stop_token_ids == (2,) and processor.appends


def test_processors_can_be_pickled():
    processor = PROCESSORS["headers"]
    copy = pickle.loads(pickle.dumps(processor))
    turns = [Turn("human", "Hi")]
    assert copy.prompt(turns).input_ids.tolist() == processor.prompt(turns).input_ids.tolist()
    assert copy.template.definition == processor.template.definition


def test_the_template_s_file_goes_before_the_config(tmp_path):
    Tokenizer(BPE.to_str(), {**NAMED, "chat_template": "old"}).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"], encoding="utf-8")
    read = Tokenizer.from_folder(tmp_path)
    assert read.chat_template == TEMPLATES["chatml"]
    read.save(tmp_path / "copy")
    assert Tokenizer.from_folder(tmp_path / "copy").chat_template == TEMPLATES["chatml"]
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert Tokenizer(BPE.to_str(), {"chat_template": several}).chat_template == "b"
    with pytest.raises(UserError, match=r"'chat_template' of tokenizer_config\.json must be a text"):
        _ = Tokenizer(BPE.to_str(), {"chat_template": 5}).chat_template
    assert Tokenizer(BPE.to_str(), {"bos_token": {"content": "<s>"}, "x_token": 3}).named_tokens == {"bos_token": "<s>"}
