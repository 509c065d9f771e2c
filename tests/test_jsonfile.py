"""JSON means one thing or is refused in one line: the one place where it is read."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

import mmmamba
from mmmamba.errors import UserError
from mmmamba.jsonfile import MAX_DEPTH, parse_json, read_any, read_bytes, read_json, read_lines

REFUSED = {
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice in one object"),
    "a key twice, escaped": ('{"a": 1, "\\u0061": 2}', "the key 'a' appears twice in one object"),
    "a key that moves the cursor": ('{"\\u001b[2J": 1, "\\u001b[2J": 1}', r"the key '\\x1b\[2J' appears twice"),
    "NaN": ("[NaN]", "NaN is not a JSON number"),
    "-Infinity": ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    "too large for a float": ("1e999", "the number 1e999 is too large"),
    "5,000 digits": ("9" * 5000, "a number of 5000 digits"),
    "400 digits": ("[-" + "9" * 400 + "]", "a number of 401 digits"),
    "deep lists": ("[" * 200_000, "nested too deeply"),
    "deeper than anything has use for": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
    "deep objects": ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply"),
    "half a character": ('["\\ud83d"]', r"half a character \(\\ud83d\)"),
    "not UTF-8": (b'"\xff"', r"not UTF-8 text \(byte 1\)"),
    "surrogate in UTF-8": (b'"\xed\xa0\x80"', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "nothing": ("", "not JSON: Expecting value"),
    "more than one": ("{} {}", "not JSON: Extra data"),
    "a comment": ('{"a": 1} // x', "not JSON"),
    "a control character": ('"a\nb"', "not JSON: Invalid control character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_two_readers_may_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    text, complaint = REFUSED[name]
    with pytest.raises(UserError, match=f"^where: .*{complaint}") as refusal:
        parse_json(text, "where")
    assert len(str(refusal.value)) < 200 and str(refusal.value).isprintable()
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"x\.json:.*{complaint}"):
        read_any(file)


def test_the_rest_is_read_as_python_does() -> None:
    data = {"": [0, -1, 1.5, 1e-300, 2**63, True, None, "é😀\u2028\0"], "deep": 1}
    for _ in range(MAX_DEPTH - 3):
        data = {"in": [1], "deep": data}
    for ascii_only in (True, False):
        assert parse_json(json.dumps(data, ensure_ascii=ascii_only), "x") == data
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]


def test_errors_are_of_the_kind_that_is_asked_for() -> None:
    class Other(UserError):
        pass

    with pytest.raises(Other, match=r"^a\.jsonl:3: not JSON"):
        parse_json("{", "a.jsonl:3", error=Other)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "x")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a pipe, not a file"):  # and does not wait for somebody to write
        read_json(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"is not a path|no such file"):
        read_json(str(tmp_path / "a\0b"))
    (tmp_path / "list").write_text("\n[1]")
    with pytest.raises(UserError, match="list: must hold a JSON object, got list"):
        read_json(tmp_path / "list")
    with pytest.raises(UserError, match="list: has more than 3 bytes"):
        read_any(tmp_path / "list", limit=3)
    (tmp_path / "lines").write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match="lines:3: not JSON"):
        read_json(tmp_path / "lines")


def test_logs_of_a_killed_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_lines(log) == [{"a": 1}, {"a": 2}]
    log.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(UserError, match="log:2: not JSON"):
        read_lines(log)
    log.write_text('{"a": 1}\n3\n')
    with pytest.raises(UserError, match="log:2: must hold a JSON object, got 3"):
        read_lines(log)


def test_nothing_else_in_the_package_parses_json() -> None:
    package = Path(mmmamba.__file__).parent
    others = {
        f"{file.relative_to(package)}:{node.lineno}"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("load", "loads", "JSONDecoder")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    copies = {"hf/chat_messages.py"}  # it reads only what it wrote itself, to have plain data
    assert {place.split(":")[0] for place in others} - copies == {"jsonfile.py"}


def test_what_a_file_is_instead_is_said_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text("12345")
    with pytest.raises(UserError, match=r"^[^ ]*long\.json: has more than 4 bytes"):
        read_bytes(tmp_path / "long.json", limit=4)
    with pytest.raises(UserError, match=r"^/dev/null: is a device, not a file$"):
        read_bytes("/dev/null")
