"""Chat templates are somebody else's programs: what they may do is bounded, and what honest ones need is there."""
# ruff: noqa: E501 (templates, one a line)

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from mmmamba.data.bpe_training import train_bpe
from mmmamba.data.jinja_chat import ChatJinja
from mmmamba.data.jinja_sandbox import MAX_SOURCE
from mmmamba.data.tokenizer import Tokenizer
from mmmamba.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
NEST = "{% set ns = namespace(x=['a'], y=['b']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
NEST += "{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
FOREVER = "{%% for i in range(99999) %%}%s{%% endfor %%}"
LONG = "{% set a = 'a' * 4000000 %}{% set b = 'a' * 2000 ~ 'b' ~ 'a' * 2000 %}"

ATTACKS = [
    "{{ 'a' * 10**10 }}", "{{ 10000000000 * 'a' }}", "{{ ([1] * 10**10) | length }}", "{{ 9**9**9**9**9 }}",
    "{{ range(10**9) | list | length }}", "{{ 2.5 | round(10**9, 'ceil') }}", "{{ lipsum(n=10**8) }}",
    FOREVER % (FOREVER % "x"), FOREVER % "{% for a in range(99999) if false %}{% endfor %}",
    FOREVER % "{% set x = range(99999) | sort %}", FOREVER % "{% set x = range(99999) | map('string') | list %}",
    DOUBLE % ("'a'", "ns.x ~ ns.x"), DOUBLE % ("'a'", "ns.x + ns.x"), DOUBLE % ("[1]", "ns.x + ns.x"),
    DOUBLE % ("'a'", "'%s%s' % (ns.x, ns.x)"), DOUBLE % ("'a'", "'{0}{0}'.format(ns.x)"),
    DOUBLE % ("'a'", "[ns.x, ns.x] | join"), DOUBLE % ("'a'", "ns.x.replace('', 'bb')"),
    DOUBLE % ("'a'", "(ns.x, ns.x)"), DOUBLE % ("'&&&&&&&&' * 100000", "ns.x | forceescape | string ~ ''"),
    NEST + "{{ ns.x }}", NEST + "{{ ns.x == ns.y }}", NEST + "{{ ns.x in [ns.y] }}", NEST + "{{ [ns.x].index(ns.y) }}",
    NEST + "{{ ns.x | tojson | length }}", NEST + "{{ '%r' % [ns.x] }}", NEST + "{{ '{!r}'.format(ns.x) }}",
    NEST + "{{ ns.x is upper }}", NEST + "{{ raise_exception(ns.x) }}", NEST + "{{ messages[ns.x].foo }}",
    NEST + "{{ [ns.x, ns.y] | sort }}", NEST + "{{ ns.x() }}",
    "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
    "{% set ns = namespace(x='a') %}" + FOREVER % "{% set ns.x = (ns.x,) %}" + "{{ {ns.x: 1} | length }}",
    "{{ 'a' | center(10**10) }}", "{{ 'a'.center(10**10) }}", "{{ 'a'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.1000000000f' | format(1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}", "{{ '{:>99999999999}'.format('a') }}", "{{ '{:{}}'.format('a', 10**9) }}",
    "{{ '{a:>99999999999}'.format_map({'a': 1}) }}", "{{ 'a\nb' | indent(10**9) }}",
    "{{ ('\n' * 1000000) | indent(60000) }}", "{{ [1] | batch(10**9, 'x') | list }}", "{{ [1] | slice(10**9) | list }}",
    "{{ range(99999) | join('x' * 100000) }}", "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ [1, 2] | tojson(indent=10**9) }}", "{{ ([1] * 9) | tojson(separators=('x' * 10**6, ':')) }}",
    "{{ (5).to_bytes(10**10, 'big') }}", "{{ {}.fromkeys(range(99999)) }}", "{{ ([[1] * 999] * 999) | sum(start=[]) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    FOREVER % ("y" * 100000), "{% set x %}" + FOREVER % ("y" * 100000) + "{% endset %}",
    "{% set s = 'a' * 1000000 %}{% set ns = namespace(l=[]) %}" + FOREVER % "{% set ns.l = ns.l + [s[1:]] %}",
    LONG + FOREVER % "{% if b in a %}{% endif %}", LONG + FOREVER % "{% if a == a ~ '' %}{% endif %}",
    "{% set a = 'a' * 4000000 %}{{ a.rfind('b' ~ a) }}", "{% set a = 'a' * 1000000 %}{{ a | trim('b' * 1000000) }}",
    "{% set a = ('f' * 4000000) | int(base=16) %}{{ a // 3 }}", "{{ " + "9" * 100000 + " }}",
    "{{ " + "(" * 60000 + ")" * 60000 + " }}", "{{ " + "[" * 60000 + "]" * 60000 + " }}",
    "{% if a %}" * 9000 + "{% endif %}" * 9000, "{{ '" + "\\'" * 60000, "{#" * 60000, "x" * (MAX_SOURCE + 1),
    "{% import 'x' as y %}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
    "{{ raise_exception('a\x1b[2J\n' * 1000000) }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ATTACKS, ids=range(len(ATTACKS)))
def test_what_would_take_too_long_or_grow_too_large_is_refused(source: str) -> None:
    started, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"^tokenizer\.json: the chat template") as caught:
        ChatJinja(source, "tokenizer.json").render(MESSAGES, add_generation_prompt=True)
    assert time.thread_time() - started < 9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


HONEST = [
    "{% for m in messages %}{{ m.role ~ ': ' + m['content'] | trim }}{{ '\n' if not loop.last }}{% endfor %}",
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.text }}",
    "{% macro show(m) %}{{ m.role | upper }}={{ m.content }}{% endmacro %}{% for m in messages[::-1] %}{{ show(m) }}{% endfor %}",
    "{{ messages | tojson }}{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=2) }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index0 }}{{ m.content.split('i')[-1].strip() }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].items() | list }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.previtem.role }}{% break %}{% endfor %}",
    "{{ '%s-%03d' % ('a', 7) }}{{ '{}:{:>4}'.format('a', 7) }}{{ 'a-b-c'.rsplit('-', 1)[0] }}{{ [1, 2] + [3] }}{{ 2 ** 9 }}",
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}{{ range(3) | list }}{{ 'x' * 3 }}{{ (1, 'a') }}",
    "{% set x %}{{ messages[0].content }}!{% endset %}{{ x | indent(2, first=true) }}{{ x in 'hi!' }}{{ none is none }}",
    "{{ 'abc'[1:] }}{{ messages[-1:] }}{{ nothing is defined }}{{ nothing | default('d') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ -3 | abs }}",
    "{% for n in [[1, [2]], [3]] recursive %}{{ n if n is number else loop(n) }}{% endfor %}",
    "{% call(x) wrap() %}{{ x }}{% endcall %}" .join(["{% macro wrap() %}<{{ caller('in') }}>{% endmacro %}", ""]),
    "{{ {'a': 1}.get('b', 2) }}{{ 'a'.startswith(('a', 'b')) }}{{ ['a', 'b', 'a'] | unique | list }}{{ messages | first }}",
    "{{ [3, 1, 2] | sort(reverse=true) }}{{ 'a b' | title }}{{ 'x' | replace('x', 'y') }}{{ 1.5 | round | int }}{{ '5' | int + 1 }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HONEST, ids=range(len(HONEST)))
def test_honest_templates_render_as_in_transformers(source: str) -> None:
    expected, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)
    assert ChatJinja(source, "x")._rendered(MESSAGES, {"add_generation_prompt": True}) == expected[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_answers_are_marked_where_transformers_marks_them(texts: list[str]) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content | trim }}<e>{% endgeneration %}|{% endfor %}"
    )
    messages = [{"role": "user", "content": text} for text in texts]
    text, spans = ChatJinja(source, "x").spans(messages)
    expected, marks = render_jinja_template([messages], chat_template=source, return_assistant_tokens_mask=True)
    assert (text, spans) == (expected[0], list(marks[0]))


def test_a_long_conversation_has_room() -> None:
    messages = [{"role": "user", "content": "a long text " * 500}] * 100
    for source in HONEST[:3]:
        assert len(ChatJinja(source, "x").render(messages)) > 500_000


def test_messages_are_put_into_the_form_that_a_template_reads() -> None:
    parts = ("{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
             "{% elif p.type == 'image' %}<image>{% endif %}{% endfor %};{% endfor %}")  # fmt: skip
    text = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    both = text.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% else %}" + parts.split(":", 1)[1]
                        .rsplit(";", 1)[0] + "{% endif %}")  # fmt: skip
    listed: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": listed}, {"role": "assistant", "content": "red"}]
    assert ChatJinja(parts, "x").render(messages) == "user:<image>what?;assistant:red;"
    assert ChatJinja(text, "x").render(messages) == "user:<image>\nwhat?;assistant:red;"
    assert ChatJinja(both, "x").render(messages) == "user:<image>what?;assistant:red;"


def test_every_file_a_template_comes_from(tmp_path: Path) -> None:
    """The bounds hold wherever it stands: the config, its own file."""
    from mmmamba.data.processor import Processor
    from mmmamba.data.sample import Turn
    from mmmamba.model import ModelConfig, StackConfig

    stack = StackConfig(num_layers=0, intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=4)
    config = ModelConfig(hidden_size=4, vocab_size=300, template="tokenizer", embedding=stack, decoder=stack)
    evil = "{{ 'a' * 10**10 }}"
    bpe = train_bpe(["a b"], 264).to_str()
    Tokenizer(bpe, {"chat_template": evil}).save(tmp_path / "config")
    Tokenizer(bpe, {}).save(tmp_path / "file")
    (tmp_path / "file" / "chat_template.jinja").write_text(evil)
    for folder in ("config", "file"):
        with pytest.raises(UserError, match="makes a value of 10,000,000,000 characters"):
            Processor(Tokenizer.from_folder(tmp_path / folder), config).prompt([Turn("human", "hi")])
