"""Records: what is read, and one clear error for everything that cannot be."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from mmmamba.data.jsonl import MAX_LINE, JsonlDataset
from mmmamba.data.sample import BadSample, Turn
from mmmamba.errors import UserError

GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "file.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def turns(*pairs: tuple[object, object]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def test_reads_every_field(tmp_path):
    record = {"id": 7, "image": ["a.png", "/b/c.png"], "ability": "count", "width": 3, **GOOD}
    sample = JsonlDataset(write(tmp_path, record))[0]
    assert sample.id == "7"
    assert sample.turns == (Turn("human", "Hi"), Turn("gpt", "Hello"))
    assert sample.images == (str(tmp_path / "a.png"), "/b/c.png")
    assert sample.where.endswith("file.jsonl:1")
    assert sample.extra == {"ability": "count", "width": 3}


def test_image_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = write(tmp_path, {"image": "a.png", **GOOD})
    assert JsonlDataset(path, tmp_path / "pictures")[0].images == (str(tmp_path / "pictures" / "a.png"),)
    with pytest.raises(UserError, match="no such image folder"):
        JsonlDataset(path, tmp_path / "none")


def test_text_only_and_missing_id(tmp_path):
    data = JsonlDataset(write(tmp_path, GOOD, {**GOOD, "image": None, "id": None}, {**GOOD, "image": []}))
    assert [(sample.id, sample.images) for sample in (data[0], data[1], data[2])] == [("1", ()), ("2", ()), ("3", ())]


def test_lines_are_found_without_reading_the_file_whole(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps({**GOOD, "id": "é"}).encode(), b"", b" \t\r", GOOD, b"")
    data = JsonlDataset(path)
    assert len(data) == 2
    assert [data[0].id, data[-1].where] == ["é", f"{path}:4"]
    with pytest.raises(IndexError):
        data[2]
    last = data[1].turns
    path.write_bytes(path.read_bytes()[:-1])  # no newline at the end
    assert JsonlDataset(path)[1].turns == last


def test_pickles_and_iterates(tmp_path):
    data = JsonlDataset(write(tmp_path, GOOD, GOOD))
    copy = pickle.loads(pickle.dumps(data))
    assert [sample for sample in copy] == [data[0], data[1]]


def test_empty_file(tmp_path):
    (tmp_path / "file.jsonl").write_bytes(b"")
    assert len(JsonlDataset(tmp_path / "file.jsonl")) == 0


@pytest.mark.parametrize("name, reason", [("none.jsonl", "no such data file"), (".", "not a file")])
def test_no_file(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        JsonlDataset(tmp_path / name)


BAD = {
    "not JSON": (b"{'id': 1}", "not JSON"),
    "half a line": (b'{"id": "x", "conversations": [', "not JSON"),
    "empty object": (b"{}", "'conversations' is missing"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8"),
    "very deep": (b"[" * 100_000, "not usable JSON|not JSON"),
    "very long number": (b'{"id": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "key twice": (b'{"image": "0.png", "image": "1.png"}', "the key 'image' appears twice"),
    "key twice inside": (
        b'{"conversations": [{"from": "human", "value": "a", "value": "b"}]}',
        "the key 'value' appears",
    ),
    "NaN": (b'{"id": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"score": -Infinity}', "-Infinity is not a JSON number"),
    "too large": (b'{"score": 1e999}', "1e999 is too large"),
    "deep": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
    "too long": (b'{"id": "' + b"x" * MAX_LINE + b'"}', "the line has 8,388,619 bytes, may have 8,388,608"),
    "zero byte": (b'{"id": "\0"}', "not JSON"),
    "list": ([1], "must be a JSON object, got a list"),
    "string": ("text", "must be a JSON object, got a string"),
    "null": (None, "must be a JSON object, got null"),
    "id": ({**GOOD, "id": ["x"]}, "'id' must be a string or a number, got a list"),
    "conversations missing": ({"id": "x"}, "'conversations' is missing"),
    "conversations null": ({"conversations": None}, "'conversations' must be a list of turns, got null"),
    "conversations string": ({"conversations": "Hi"}, "'conversations' must be a list of turns, got a string"),
    "conversations empty": ({"conversations": []}, "'conversations' is empty"),
    "system only": (turns(("system", "Be kind.")), "'conversations' is empty after its system turn"),
    "turn is a string": ({"conversations": ["Hi"]}, r"'conversations\[0\]' must be an object"),
    "no from": ({"conversations": [{"value": "Hi"}]}, r"'conversations\[0\]\.from' is missing"),
    "no value": ({"conversations": [{"from": "human"}]}, r"'conversations\[0\]\.value' is missing"),
    "unknown role": (turns(("user", "Hi")), r"\[0\]\.from' must be one of human, gpt, system, got 'user'"),
    "role is a number": (turns((1, "Hi")), r"\[0\]\.from' must be one of human, gpt, system, got 1"),
    "role is a list": (turns((["human"], "Hi")), r"\[0\]\.from' must be one of"),
    "gpt first": (turns(("gpt", "Hi")), r"\[0\]\.from' must be 'human' here, got 'gpt'"),
    "human twice": (turns(("human", "a"), ("human", "b")), r"\[1\]\.from' must be 'gpt' here, got 'human'"),
    "gpt twice": (turns(("human", "a"), ("gpt", "b"), ("gpt", "c")), r"\[2\]\.from' must be 'human' here"),
    "late system": (turns(("human", "a"), ("system", "b")), r"\[1\]\.from' must be 'gpt' here, got 'system'"),
    "value is a number": (turns(("human", 5)), r"\[0\]\.value' must be a string, got a number"),
    "value is null": (turns(("human", "a"), ("gpt", None)), r"\[1\]\.value' must be a string, got null"),
    "value is a list": (turns(("human", [])), r"\[0\]\.value' must be a string, got a list"),
    "lone surrogate": (turns(("human", "\ud800")), "half a character"),
    "image is a number": ({**GOOD, "image": 5}, "'image' must be a path or a list of paths, got a number"),
    "image is an object": ({**GOOD, "image": {}}, "'image' must be a path or a list of paths, got an object"),
    "image is true": ({**GOOD, "image": True}, "'image' must be a path or a list of paths, got true/false"),
    "image is empty": ({**GOOD, "image": ""}, "'image' must be a path, got ''"),
    "image with a zero byte": ({**GOOD, "image": "a\0b"}, "'image' must be a path"),
    "image in the list": ({**GOOD, "image": ["a.png", 3]}, r"'image\[1\]' must be a path, got a number"),
    "video": ({**GOOD, "video": "a.mp4"}, "'video': video samples need a later version"),
}


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD.keys())
def test_bad_records_are_named(tmp_path, line, reason):
    path = write(tmp_path, GOOD, line, GOOD)
    data = JsonlDataset(path)
    with pytest.raises(BadSample, match=reason) as caught:
        data[1]
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    assert data[2].turns == data[0].turns  # its neighbours are unharmed


def test_float_ids_are_taken(tmp_path):
    data = JsonlDataset(write(tmp_path, {"id": 17.0, **GOOD}, {"id": 0.5, **GOOD}))
    assert [data[0].id, data[1].id, data[0].named] == ["17.0", "0.5", True]


def test_windows_line_ends_and_marks(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([json.dumps(GOOD).encode()] * 2) + b"\r\n\r\n")
    assert [sample.turns for sample in JsonlDataset(path)] == [JsonlDataset(path)[1].turns] * 2
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16 text, must be UTF-8"):
        JsonlDataset(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), ("/dev/zero", "device")):
        with pytest.raises(UserError, match=f"is a {kind}, not a file"):
            JsonlDataset(path)


def test_a_very_long_line_is_passed_over_in_little_memory(tmp_path):
    path = tmp_path / "file.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps(GOOD).encode() + b"\n")
        file.truncate(200 << 20)  # zero bytes, on no disk
    with open(path, "ab") as file:
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    data = JsonlDataset(path)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    assert len(data) == 3 and data[0].turns == data[2].turns
    with pytest.raises(BadSample, match=r"file\.jsonl:2: the line has"):
        data[1]


def change_in_place(path):
    path.write_bytes(path.read_bytes().replace(b"Hello", b"Hullo"))
    os.utime(path, ns=(1, 1))


def replace(path):
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


CHANGES = {
    "gone": (lambda path: path.unlink(), r"no such data file \(it was there before\)"),
    "shorter": (lambda path: path.write_bytes(path.read_bytes()[:10]), "changed, or was replaced"),
    "longer": (lambda path: path.write_bytes(b"\n" + path.read_bytes()), "changed, or was replaced"),
    "other": (change_in_place, "changed, or was replaced"),
    "replaced": (replace, "changed, or was replaced"),
    "a pipe now": (lambda path: (path.unlink(), os.mkfifo(path)), "changed, or was replaced"),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_changes_while_it_is_in_use(tmp_path, change, reason):
    path = write(tmp_path, GOOD, GOOD)
    data = JsonlDataset(path)
    assert data[1].turns
    change(path)
    with pytest.raises(UserError, match=reason) as caught:
        data[1]
    assert str(caught.value).startswith(f"{path}: ")
    assert not isinstance(caught.value, BadSample)  # which a run may be told to skip
