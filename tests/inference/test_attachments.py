"""What is put before a question stands where it should, and a text that is none is named."""

from __future__ import annotations

import pytest
from PIL import Image

from mmmamba.data.video import choose_frames
from mmmamba.errors import UserError
from mmmamba.inference.attachments import Attachments, read_text
from videos import write_video


@pytest.fixture
def attachments(tmp_path) -> Attachments:
    """Two pictures, a text and a video of three frames."""
    pytest.importorskip("av")
    shown = Attachments()
    for name in "ab":
        Image.new("RGB", (56, 56), "red").save(tmp_path / f"{name}.png")
        shown.add_picture(tmp_path / f"{name}.png")
    (tmp_path / "story.txt").write_text("once\nupon a time", encoding="utf-8")
    shown.add_text(tmp_path / "story.txt")
    shown.add_video(write_video(tmp_path / "v.mkv", range(0, 3000, 100)))
    return shown


def names(pictures) -> list[str]:
    return [picture.path.name for picture in pictures]


def test_the_order_of_what_goes_before_a_question(attachments):
    text, pictures = attachments.before("what?")
    assert text == "once\nupon a time\nFrame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat?"
    assert names(pictures) == ["a.png", "b.png", "v.mkv", "v.mkv", "v.mkv"], "those without a mark come first"
    text, pictures = attachments.before("what is <image>?")
    assert text.endswith("Frame3: <image>\nwhat is <image>?")
    assert names(pictures) == ["a.png", "v.mkv", "v.mkv", "v.mkv", "b.png"]


def test_counts_and_clearing(attachments):
    assert str(attachments) == "2 pictures, 1 text, 1 video (3 frames)"
    attachments.clear()
    assert attachments.before("what?") == ("what?", [])


def test_frames_are_taken_as_asked(attachments):
    path = attachments.videos[0][0].path
    other = Attachments(fps=2.0, max_frames=4)
    other.add_video(path)
    assert other.videos == [choose_frames(path, fps=2.0, max_frames=4)] and len(other.videos[0]) == 4


def test_text_is_read_as_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGröße\r\n中文".encode())
    assert read_text(path) == "Größe\n中文\n"
    path.write_bytes(b"one\n\n")
    assert read_text(path) == "one\n\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "the text file is empty"),
        (b"caf\xe9 au lait", "not UTF-8 text: byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfab\xff", "not UTF-8 text: byte 0xff at offset 5"),
        (b"a\nb <image> c\n", "contains '<image>', which marks a picture in a question"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(content, reason, tmp_path):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_text(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
