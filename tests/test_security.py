"""What docs/security.md promises and no other test holds: its numbers are the code's, and no verb asks the network."""

from __future__ import annotations

import importlib
import re
import socket
from pathlib import Path

import pytest

from documents import ROOT
from mmmamba import cli

PAGE = (ROOT / "docs" / "security.md").read_text()
BOUNDS = {
    "mmmamba.jsonfile": {"MAX_BYTES": "16 MiB", "MAX_DEPTH": "64 levels", "MAX_DIGITS": "64 digits",
                         "MAX_TOKENIZER_BYTES": "128 MiB"},
    "mmmamba.data.jsonl": {"MAX_LINE": "8 MiB"},
    "mmmamba.yaml12": {"MAX_CHARACTERS": "262,144 characters", "MAX_DEPTH": "50 levels",
                       "MAX_VALUES": "100,000 values"},
    "mmmamba.data.image_decoding": {"MAX_SIDE": "20,000 pixels", "MAX_PIXELS": "64 megapixels", "MAX_BYTES": "512 MiB"},
    "mmmamba.model.config": {"MAX_TILES": "1,024", "MAX_VOCABULARY": "33,554,432 tokens"},
    "mmmamba.model.stack": {"MAX_LAYERS": "1,024 layers", "MAX_WIDTH": "1,048,576 wide", "MAX_HEADS": "8,192 heads"},
    "mmmamba.data.jinja_sandbox": {"MAX_SOURCE": "131,072 characters"},
    "mmmamba.checkpoints.gguf_file": {"MAX_FIELDS": "10,000 fields", "MAX_TENSORS": "100,000 tensors",
                                      "MAX_ITEMS": "4,000,000 list items"},
    "mmmamba.inference.session": {"MAX_HEADER": "90,000,000 bytes"},
}  # fmt: skip


@pytest.mark.parametrize("module", BOUNDS)
def test_the_page_s_bounds_are_the_code_s(module):
    code = importlib.import_module(module)
    rows = "\n".join(line for line in PAGE.split("\n") if f"`{module}`" in line)
    for name, text in BOUNDS[module].items():
        assert re.search(rf"(?<![\d,]){re.escape(text)}", rows), f"{text} does not stand beside {module}"
        number, unit = text.split()[0].replace(",", ""), text.partition(" ")[2]
        factor = {"MiB": 1 << 20, "megapixels": 10**6}.get(unit, 1)
        assert getattr(code, name) == int(number) * factor, f"{module}.{name} is not {text}"


def test_the_page_s_formats_are_the_code_s():
    from mmmamba.data.image_decoding import FORMATS

    (row,) = (line for line in PAGE.split("\n") if line.startswith("| pictures |"))
    assert re.findall(r"[A-Z]{3,4}", row) == [*FORMATS]


def test_the_page_s_tests_are_there():
    named = set(re.findall(r"`(tests/[\w/.]+)`", PAGE))
    assert len(named) > 10 and all((ROOT / name).exists() for name in named)


def test_no_verb_asks_the_network(monkeypatch, tmp_path, teacher_folder, small_data):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    teacher, data = str(teacher_folder), str(small_data)
    for line in (
        ["inspect", teacher],
        ["convert", teacher, "copy"],
        ["data", "check", data, "--teacher", teacher, "--workers", "0"],
        ["chat", teacher, "red ?", "--max-new-tokens", "1"],
        ["eval", teacher, "--data", data, "--max-new-tokens", "1", "--no-blind", "--out", "e"],
    ):
        assert cli.main(line) == 0, line
    for name in ("nobody/no-such-model", "https://127.0.0.1:9/model"):
        assert cli.main(["inspect", name]) == 2
    assert Path("copy", "config.json").is_file()
