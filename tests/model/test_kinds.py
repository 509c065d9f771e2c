"""Nothing outside of model/mixers asks which kind a layer is: it asks the mixer, or the register."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmmamba
from mmmamba.config_files import from_dict, to_dict
from mmmamba.errors import UserError
from mmmamba.model import ModelConfig
from mmmamba.model.mixers import Mamba2Options, kinds
from mmmamba.model.mixers.attention import AttentionOptions
from tiny import make_config

SOURCE = Path(mmmamba.__file__).parent
MIXERS = SOURCE / "model" / "mixers"
NAMES = {"ATTENTION", "MAMBA2"}
CLASSES = {"Attention", "Mamba2", "KVState", "GrowingKV", "MambaState", "KVPool", "MambaPool"}
CLASSES |= {"Mamba2Options", "AttentionOptions"}


def questions(tree: ast.AST, kind_names: set[str]) -> list[tuple[int, str]]:
    """The line and the text of every question for a kind."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            equal = all(isinstance(op, (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)) for op in node.ops)
            if equal and any(_names_a_kind(side, kind_names) or _rule(side) for side in sides):
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "plain"):
            if any(isinstance(one, ast.Name) and one.id in CLASSES for one in ast.walk(node)):
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, (ast.Match,)) and any(
            isinstance(one, ast.Constant) and one.value in kind_names for one in ast.walk(node)
        ):
            found.append((node.lineno, "match"))
    return found


def _names_a_kind(side: ast.expr, kind_names: set[str]) -> bool:
    constant = isinstance(side, ast.Constant) and side.value in kind_names
    return constant or (isinstance(side, ast.Name) and side.id in NAMES)


def _rule(side: ast.expr) -> bool:
    return isinstance(side, ast.Attribute) and side.attr == "rule"


@pytest.mark.parametrize(
    "asks",
    [
        "kind == ATTENTION",
        "'mamba2' != kind",
        "isinstance(mixer, Mamba2)",
        "isinstance(x, (int, KVState))",
        "mixer.rule == 'ssd'",
        "plain(Attention, mixer)",
    ],
)
def test_a_question_is_found(asks):
    assert questions(ast.parse(asks), set(kinds()))


def test_only_the_kinds_own_files_ask_for_kinds():
    asked = {
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in sorted(SOURCE.rglob("*.py"))
        if MIXERS not in path.parents
        for line, text in questions(ast.parse(path.read_text(encoding="utf-8")), set(kinds()))
    }
    assert not asked, "\n".join(sorted(asked))


def test_a_config_holds_the_options_of_several_kinds():
    rotated, plain = Mamba2Options(rope=True), AttentionOptions()
    config = make_config(("attention", "mamba2", "mamba2", "attention", "mamba2"), mixer=(rotated, plain))
    assert config.options("mamba2") is rotated and config.options("attention") is plain
    assert make_config().options("mamba2") == Mamba2Options()
    written = to_dict(config)
    written["mixer"][0]["kind"] = "mamba2"
    assert from_dict(ModelConfig, written) == config
    for wrong, complaint in (
        ([{"rope": True}, {"rope": False}], "options of one kind more than once"),
        ({"kind": "mamba3"}, "'mixer': there is no kind of layer 'mamba3'"),
        ({"kind": "attention", "rope": True}, "unknown key 'mixer.rope'"),
    ):
        with pytest.raises(UserError, match=complaint):
            from_dict(ModelConfig, {**written, "mixer": wrong})
