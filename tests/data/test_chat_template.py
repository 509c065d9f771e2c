"""Prompt strings against the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmmamba.data.chat_template import add_missing_marks, count_marks, get_template, render
from mmmamba.data.sample import Turn
from mmmamba.errors import UserError

PROMPTS = json.loads(
    (Path(__file__).parents[1] / "golden" / "preprocess.json").read_text(encoding="utf-8")
)["prompts"]  # fmt: skip
TEMPLATE = get_template("internlm2-chat")


@pytest.mark.parametrize("name", [name for name in PROMPTS if not name.startswith("_")])
def test_golden_prompts(name):
    golden = PROMPTS[name]
    args = golden["args"]
    turns = [Turn(*pair) for q, a in args.get("history", []) for pair in (("human", q), ("gpt", a))]
    turns.append(Turn("human", args["question"]))
    tiles = args.get("npl") or ([int(args["px"].split()[2])] if args["px"] else [])
    pieces = TEMPLATE.pieces(add_missing_marks(turns, len(tiles)), reply=True)
    assert render(pieces, [count * args.get("nit", 0) for count in tiles]) == golden["prompt"]


def test_golden_parts():
    golden = PROMPTS["_template"]
    assert TEMPLATE.system_message == golden["system_message"]
    assert TEMPLATE.start + TEMPLATE.system_role + "{system_message}" == golden["system_template"]
    assert [TEMPLATE.start + TEMPLATE.user_role, TEMPLATE.start + TEMPLATE.assistant_role] == golden["roles"]
    assert TEMPLATE.end == golden["sep"]


@pytest.mark.parametrize("message, expected", [
    ("", "<|im_start|>user\nHi<|im_end|>"),
    ("Be kind.", "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\nHi<|im_end|>"),
])  # fmt: skip
def test_system_message(message, expected):
    assert render(TEMPLATE.pieces([Turn("human", "Hi")], system_message=message, reply=False)) == expected
    own = [Turn("system", message), Turn("human", "Hi")]
    assert render(TEMPLATE.pieces(own, system_message="other", reply=False)) == expected


def test_answers_are_scored_with_their_end_mark():
    turns = [Turn("human", "a"), Turn("gpt", "b"), Turn("human", "c"), Turn("gpt", "")]
    scored = [piece.text for piece in TEMPLATE.pieces(turns, reply=False) if piece.scored]
    assert scored == ["b", "<|im_end|>", "<|im_end|>"]


def test_missing_marks_go_before_the_first_human_turn():
    turns = [Turn("system", "s"), Turn("human", "a"), Turn("gpt", "<image>"), Turn("human", "<image>\nb")]
    assert count_marks(turns) == 1
    marked = add_missing_marks(turns, 3)
    assert [turn.text for turn in marked] == ["s", "<image>\n<image>\na", "<image>", "<image>\nb"]
    assert add_missing_marks(turns, 1) == tuple(turns)


def test_unknown_template():
    with pytest.raises(UserError, match=r"unknown template 'x' \(known: internlm2-chat, solo\)"):
        get_template("x")
