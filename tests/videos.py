"""Small videos of plain frames, encoded for a test."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np


def write_video(
    path: Path,
    milliseconds: Sequence[int],
    *,
    size: tuple[int, int] = (56, 56),
    codec: str = "mpeg4",
    format: str | None = None,
) -> Path:
    """A video with a frame at each time; frame i is plain grey of level 20·i, its left quarter white."""
    import av

    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.bit_rate = 4_000_000
        for i, time in enumerate(milliseconds):
            pixels = np.full((size[1], size[0], 3), 20 * i % 240, np.uint8)
            pixels[:, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_no_frame(path: Path) -> Path:
    """A video file that is whole and has no frame."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        container.start_encoding()
    return path
