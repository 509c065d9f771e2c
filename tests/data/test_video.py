"""Which frames of a video are taken, that they are read one at a time, and that a broken video is one clear error."""

from __future__ import annotations

import importlib.util
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mmmamba.data import video
from mmmamba.data.video import Frame, choose_frames, frame_marks, read_frames
from mmmamba.errors import UserError
from videos import write_no_frame, write_video

pytest.importorskip("av")


def numbers(frames: list[Frame]) -> list[int]:
    return [frame.index for frame in frames]


def level(image) -> int:
    """Which frame of :func:`write_video` a picture is (of twelve)."""
    return round(float(np.asarray(image)[:, image.width // 2 :].mean()) / 20)


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """Three and a half seconds at 10 frames a second."""
    return write_video(tmp_path_factory.mktemp("videos") / "steady.mp4", range(0, 3500, 100))


def test_the_first_frame_of_every_interval_is_taken(steady):
    frames = choose_frames(steady)
    assert numbers(frames) == [0, 10, 20, 30]
    assert [frame.time for frame in frames] == [0.0, 1.0, 2.0, 3.0]
    assert all(frame.size == (56, 56) and frame.path == steady for frame in frames)
    assert numbers(choose_frames(steady, fps=2)) == [0, 5, 10, 15, 20, 25, 30]
    assert numbers(choose_frames(steady, fps=0.4)) == [0, 25]
    assert numbers(choose_frames(steady, fps=1000)) == list(range(35)), "no frame is taken twice"


def test_more_frames_than_allowed_are_spread_evenly(steady):
    assert numbers(choose_frames(steady, fps=10, max_frames=5)) == [0, 7, 14, 21, 28]
    assert numbers(choose_frames(steady, fps=10, max_frames=1)) == [0]
    assert numbers(choose_frames(steady, fps=2, max_frames=7)) == [0, 5, 10, 15, 20, 25, 30]


def test_a_varying_frame_rate_goes_by_time(tmp_path):
    times = [0, 40, 80, 1500, 1600, 5000, 5040, 5999, 6000]
    path = write_video(tmp_path / "varying.mkv", times)
    frames = choose_frames(path)
    assert [(frame.index, frame.time) for frame in frames] == [(0, 0.0), (3, 1.5), (5, 5.0), (8, 6.0)]
    assert [level(image) for image in read_frames(path, numbers(frames))] == [0, 3, 5, 8]


def test_a_stream_without_duration_or_timestamps(tmp_path):
    path = write_video(tmp_path / "raw.m4v", range(0, 3000, 40), format="m4v")
    assert [frame.time for frame in choose_frames(path)] == [0.0, 1.0, 2.0]
    late = write_video(tmp_path / "late.ts", range(90_000, 93_000, 40))
    assert numbers(choose_frames(late)) == [0, 25, 50], "time counts from the first frame"


def test_frames_are_decoded_as_they_are_read(steady, monkeypatch):
    decoded, passes = 0, 0
    original = video._decoded

    def counted(path):
        nonlocal decoded, passes
        passes += 1
        for item in original(path):
            decoded += 1
            yield item

    monkeypatch.setattr(video, "_decoded", counted)
    images = read_frames(steady, [2, 7, 7, 3])
    assert decoded == 0
    for wanted, seen, turns in ((2, 3, 1), (7, 8, 1), (7, 16, 2), (3, 20, 3)):
        assert level(next(images)) == wanted and (decoded, passes) == (seen, turns)
    assert next(images, None) is None


def test_a_video_held_upright_stays_upright(tmp_path):
    path = write_video(tmp_path / "phone.mp4", [0, 100], size=(64, 32))
    data = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(matrix, data.index(b"tkhd"))
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # clockwise
    path.write_bytes(data)
    (frame,) = choose_frames(path)
    (image,) = read_frames(path, [0])
    assert frame.size == image.size == (32, 64)
    rows = np.asarray(image).mean((1, 2))
    assert rows[:14].min() > 200 and rows[18:].max() < 50, "its left, which is white, is now above"


def test_marks():
    frames = [Frame(Path("a.mp4"), i, float(i), (8, 8)) for i in range(2)]
    assert frame_marks(frames) == "Frame1: <image>\nFrame2: <image>\n"


def broken(folder: Path, name: str, steady: Path) -> Path:
    path = folder / f"{name}.mp4"
    if name == "empty":
        path.write_bytes(b"")
    elif name == "text":
        path.write_text("no video at all\n" * 50)
    elif name == "truncated":
        path.write_bytes(steady.read_bytes()[:2000])
    elif name == "folder":
        path.mkdir()
    elif name == "playlist":  # must not lead to other files
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:3.5,\n{steady}\n#EXT-X-ENDLIST\n")
    elif name == "sound":
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "missing": "no such file",
        "empty": "empty file",
        "text": "not a video that can be read",
        "truncated": "damaged",
        "folder": "is a folder",
        "playlist": "not a video that can be read",
        "sound": "has no video stream",
    }.items(),
)
def test_a_broken_video_is_named(name, reason, steady, tmp_path):
    path = broken(tmp_path, name, steady)
    with pytest.raises(UserError, match=reason) as error:
        choose_frames(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "reason"), [("avi", "has no frame that can be"), ("mp4", "has no video stream"), ("mkv", "not a video")]
)
def test_a_video_without_a_frame_is_named(kind, reason, tmp_path):
    """What is left of it differs by its kind of file."""
    path = write_no_frame(tmp_path / f"none.{kind}")
    assert path.stat().st_size > 0
    with pytest.raises(UserError, match=reason) as error:
        choose_frames(path)
    assert str(error.value).startswith(str(path))


def test_bad_requests_are_named(steady, monkeypatch):
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="fps must be positive"):
            choose_frames(steady, fps=fps)
    with pytest.raises(UserError, match="max_frames must be at least 1"):
        choose_frames(steady, max_frames=0)
    with pytest.raises(UserError, match="ends before its frame 35"):
        list(read_frames(steady, [35]))
    monkeypatch.setattr(video, "MAX_SIDE", 40)
    with pytest.raises(UserError, match="frames are 56x56, larger than 40 pixels a side"):
        choose_frames(steady)


def test_without_pyav_the_error_says_what_to_install(steady, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else found(name))
    with pytest.raises(UserError, match=r"needs PyAV: pip install 'mmmamba\[video\]'"):
        choose_frames(steady)


def test_chosen_frames_rise(steady):
    for most in range(1, 36):
        chosen = numbers(choose_frames(steady, fps=10, max_frames=most))
        assert len(chosen) == most and all(a < b for a, b in pairwise(chosen)) and chosen[0] == 0
