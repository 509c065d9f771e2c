"""The files by which transformers knows a folder; the Jinja template renders as ours does, whatever the texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.chat_template import OF_TOKENIZER, render
from mmmamba.data.processor import Processor
from mmmamba.data.sample import GPT, HUMAN, SYSTEM, Turn
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.data.transformers_files import chat_template, generation_settings, image_settings
from tiny import SPECIALS, WORDS, make_config

TOKENIZER = Tokenizer.from_bpe(train_bpe(WORDS * 4, 320, SPECIALS))
ROLES = {HUMAN: "user", GPT: "assistant", SYSTEM: "system"}
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\n", "{{ x }}", "{% if %}", "@END@"])


def jinja(source: str, **names: object) -> str:
    """As transformers renders it."""
    return str(_compile_jinja_template(source).render(**names))


def template_of(processor: Processor) -> str:
    return chat_template(processor.tokenizer, processor.template, processor.config)


@settings(deadline=None)
@given(
    system=st.none() | TEXT,
    first=st.none() | TEXT,
    texts=st.lists(TEXT.filter(lambda text: "<image>" not in text), max_size=4),
    reply=st.booleans(),
)
def test_the_template_renders_as_ours(system: str | None, first: str | None, texts: list[str], reply: bool) -> None:
    processor = Processor(TOKENIZER, make_config(system_message=system))
    turns = [Turn(SYSTEM, first)] if first is not None else []
    turns += [Turn((HUMAN, GPT)[i % 2], text) for i, text in enumerate(texts)]
    messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns]
    pieces = processor.template.pieces(turns, system_message=system, reply=reply)
    expected = "<s>" + render(pieces)
    for kind in (messages, [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]):
        assert jinja(template_of(processor), messages=kind, add_generation_prompt=reply) == expected


def test_pictures_are_marks_on_lines_of_their_own() -> None:
    source = template_of(Processor(TOKENIZER, make_config()))
    text, image = {"type": "text", "text": "What?"}, {"type": "image"}
    for parts, expected in (
        ([image, text], "<image>\nWhat?"),
        ([image, image, text], "<image>\n<image>\nWhat?"),
        ([text, image], "What?<image>"),
        ([image], "<image>"),
    ):
        out = jinja(source, messages=[{"role": "user", "content": parts}])
        assert out == f"<s><|im_start|>user\n{expected}<|im_end|>"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "tool", "content": "x"}, "got tool"),
        ({"role": "user", "content": [{"type": "video"}]}, "must be text or image, got video"),
    ],
)
def test_the_template_refuses_what_it_does_not_know(message: dict, complaint: str) -> None:
    source = template_of(Processor(TOKENIZER, make_config()))
    with pytest.raises(jinja2.TemplateError, match=complaint):
        jinja(source, messages=[{"role": "user", "content": "x"}, message])


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("own", [True, False])
def test_a_tokenizers_own_template_is_kept(system: str | None, own: bool, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    given = {"bos_token": "<s>", "eos_token": "</s>", **({"chat_template": source} if own else {})}
    tokenizer = Tokenizer(TOKENIZER.definition, given)
    config = make_config(template=OF_TOKENIZER, system_message=system, vision=None, img_context_token_id=-1)
    processor = Processor(tokenizer, config)
    turns = [Turn(HUMAN, "hi"), Turn(GPT, "ho")]
    expected = render(processor.template.pieces(turns, system_message=system, reply=False))
    messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns]
    assert jinja(template_of(processor), messages=messages, bos_token="<s>", eos_token="</s>") == expected
    processor.save(tmp_path)
    again = Processor(Tokenizer.from_folder(tmp_path), config)
    with_system = [Turn(SYSTEM, "Be kind."), *turns]
    for reply in (True, False):
        assert again.template.pieces(with_system, reply=reply) == processor.template.pieces(with_system, reply=reply)


def test_settings_leave_out_what_there_is_not() -> None:
    config = make_config(bos_token_id=-1, pad_token_id=-1, img_context_token_id=-1, vision=None)
    assert generation_settings(config, (-1,)) == {}
    assert image_settings(config)["image_size"] is None
    assert generation_settings(make_config(), (4, 2)) == {
        "bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [4, 2], "suppress_tokens": [7]
    }  # fmt: skip


def test_files_and_the_tokenizer_survive(tmp_path: Path) -> None:
    remote = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": "x.py"}, "bos_token": "<s>"}
    processor = Processor(Tokenizer(TOKENIZER.definition, remote), make_config())
    processor.save(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    tokenizer = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in tokenizer
    again = Processor(Tokenizer.from_folder(tmp_path / "new"), processor.config)
    turns = [Turn(HUMAN, "is it left of the square ?")]
    assert again.prompt(turns).input_ids.tolist() == processor.prompt(turns).input_ids.tolist()
    again.save(tmp_path / "newer")
    for file in (tmp_path / "new").iterdir():
        assert file.read_bytes() == (tmp_path / "newer" / file.name).read_bytes(), file.name
    assert replace(processor.config) == again.config
