"""Only regular files are opened: nothing waits at a pipe, reads a device, or a file of the system that never ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mmmamba.config_files import load_yaml
from mmmamba.errors import UserError
from mmmamba.input_files import check_file, open_file, read_bytes, read_text


def special(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("pipe")
    return {"a folder": tmp_path, "a pipe": tmp_path / "pipe", "a device": Path("/dev/zero"),
            "a socket": tmp_path / "socket"}  # fmt: skip


def test_what_is_no_regular_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    for kind, path in special(tmp_path).items():
        for read in (check_file, open_file, lambda p: read_bytes(p, 10), load_yaml):
            with pytest.raises(UserError, match=f"is {kind}, not a file"):
                read(path)
    with pytest.raises(UserError, match="link: is a pipe"):
        check_file(tmp_path / "link")
    for name in ("missing", "nul\0", "half\ud800", "x" * 5000):
        with pytest.raises(UserError, match=r"no such file|too long") as error:
            check_file(tmp_path / name)
        assert len(str(error.value)) < 500


def test_a_file_of_the_system_that_says_it_is_empty_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()  # as /proc/kmsg, from which reading waits for ever
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    assert read_bytes(tmp_path / "empty", 10) == b""


def test_size_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path, 6) == "abc"
    with pytest.raises(UserError, match="has more than 5 bytes, which is too much for such a file"):
        read_bytes(path, 5)
    path.write_bytes("abc".encode("utf-16"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0\) \(UTF-16\?\)"):
        read_text(path, 100)
