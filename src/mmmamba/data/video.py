"""Chooses frames of a video file, and reads them one at a time (PyAV, an optional dependency)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from mmmamba.data.image_decoding import MAX_PIXELS, MAX_SIDE
from mmmamba.data.sample import IMAGE_MARK
from mmmamba.errors import UserError
from mmmamba.input_files import check_file, open_file

# From a stored frame to an upright one. PyAV gives the turn, counter-clockwise, that makes it upright.
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Frame:
    """A frame of a video: its number in display order, its time in seconds after the first frame, its size.

    The size is (width, height) in pixels, upright.
    """

    path: Path
    index: int
    time: float
    size: tuple[int, int]


def choose_frames(path: str | Path, *, fps: float = 1.0, max_frames: int = 64) -> list[Frame]:
    """Choose the frames that represent a video. The whole video is decoded once; no pixels are kept.

    From the first frame's time on, the first frame of every interval of 1/``fps`` seconds is taken; an interval in
    which no frame begins gives none, whatever the rate of the video and however it varies. Of more than ``max_frames``
    that many are taken, spread evenly, the first among them.

    Raises:
        UserError: PyAV is not installed; the file is missing, no video, broken, too large, or has no frame.
    """
    check_choice(fps, max_frames)
    rate = Fraction(str(fps))  # 0.3 means three tenths: binary rounding must not move the end of an interval
    path = Path(path)
    start: Fraction | None = None
    interval: int | None = None
    taken: list[Frame] = []
    for index, (time, frame) in enumerate(_decoded(path)):
        start = time if start is None else start
        if interval != (interval := math.floor((time - start) * rate)):
            taken.append(Frame(path, index, float(time - start), _upright_size(frame)))
    if not taken:
        raise UserError(f"{path}: the video has no frame that can be decoded")
    count = min(max_frames, len(taken))
    return [taken[i * len(taken) // count] for i in range(count)]


def check_choice(fps: float, max_frames: int) -> None:
    """Refuse values with which no frame can be chosen (UserError)."""
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps must be positive, got {fps}")
    if max_frames < 1:
        raise UserError(f"max_frames must be at least 1, got {max_frames}")


def read_frames(path: str | Path, indices: Iterable[int]) -> Iterator[Image.Image]:
    """Read the frames with these numbers as upright RGB pictures, one at a time. Rising numbers take one pass.

    Raises:
        UserError: as :func:`choose_frames`, or if the video has no frame with a number.
    """
    path, before = Path(path), -1
    frames = enumerate(_decoded(path))
    for index in indices:
        if index <= before:
            frames = enumerate(_decoded(path))
        before = index
        frame = next((frame for number, (_, frame) in frames if number == index), None)
        if frame is None:
            raise UserError(f"{path}: the video ends before its frame {index}")
        image = frame.to_image()
        turn = _TURNS.get(_quarter_turn(frame))
        yield image if turn is None else image.transpose(turn)


def frame_marks(frames: Sequence[Frame]) -> str:
    """The text that represents a video, before the question: a line ``Frame1: <image>`` for each frame (InternVL)."""
    return "".join(f"Frame{number}: {IMAGE_MARK}\n" for number in range(1, len(frames) + 1))


def _decoded(path: Path) -> Iterator[tuple[Fraction, Any]]:
    """(time in seconds, PyAV frame) of a video in display order. Only a few frames are in memory at once."""
    if importlib.util.find_spec("av") is None:
        raise UserError(f"{path}: reading a video needs PyAV: pip install 'mmmamba[video]' (or pip install av)")
    if check_file(path) == 0:
        raise UserError(f"{path}: the video is an empty file (zero bytes)")
    av = importlib.import_module("av")
    with contextlib.ExitStack() as opened:
        try:
            # Give PyAV a stream, not a name, and no protocols: a playlist must not open other files or the network.
            stream = opened.enter_context(open_file(path))
            container = opened.enter_context(av.open(stream, options={"protocol_whitelist": "none"}))
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            video = container.streams.video[0]
            _check_size(path, video.codec_context.width, video.codec_context.height)
            video.thread_type = "AUTO"
            rate = video.average_rate or video.guessed_rate
            for index, frame in enumerate(container.decode(video)):
                _check_size(path, frame.width, frame.height)
                yield _time(path, frame, index, rate), frame
        except UserError:
            raise
        except (av.error.FFmpegError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: not a video that can be read, or damaged ({reason})") from error
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error


def _time(path: Path, frame: Any, index: int, rate: Fraction | None) -> Fraction:
    """The time in seconds. A stream without timestamps (raw H.264) is timed by its frame rate."""
    if frame.pts is not None and frame.time_base:
        return Fraction(frame.pts) * Fraction(frame.time_base)
    if not rate:
        raise UserError(f"{path}: the video has neither timestamps nor a frame rate")
    return Fraction(index) / Fraction(rate)


def _check_size(path: Path, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        limit = f"{MAX_SIDE:,} pixels a side or {MAX_PIXELS // 1_000_000} megapixels"
        raise UserError(f"{path}: the video's frames are {width}x{height}, larger than {limit}")


def _quarter_turn(frame: Any) -> int:
    """Degrees, counter-clockwise: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) * 90 % 360


def _upright_size(frame: Any) -> tuple[int, int]:
    size = (frame.width, frame.height)
    return size[::-1] if _quarter_turn(frame) % 180 else size
