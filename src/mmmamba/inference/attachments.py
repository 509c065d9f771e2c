"""Pictures, videos and texts from files, which are put before a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmmamba.data.lazy_pictures import PictureFile, Unread
from mmmamba.data.sample import IMAGE_MARK
from mmmamba.data.video import Frame, check_choice, choose_frames, frame_marks
from mmmamba.errors import UserError
from mmmamba.input_files import read_bytes

MAX_TEXT = 64 << 20  # bytes of a text file


@dataclass(kw_only=True)
class Attachments:
    """Files for the next question. Each is checked when it is added; pixels are decoded when the question is read.

    Attributes:
        fps, max_frames: which frames of a video are taken (:func:`mmmamba.data.video.choose_frames`).
        pictures, texts, videos: what was added.
    """

    fps: float = 1.0
    max_frames: int = 64
    pictures: list[PictureFile] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    videos: list[list[Frame]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice(self.fps, self.max_frames)

    def add_picture(self, path: Path) -> None:
        self.pictures.append(PictureFile.check(path, "chat"))

    def add_text(self, path: Path) -> None:
        self.texts.append(read_text(path))

    def add_video(self, path: Path) -> None:
        self.videos.append(choose_frames(path, fps=self.fps, max_frames=self.max_frames))

    def clear(self) -> None:
        for kind in (self.pictures, self.texts, self.videos):
            kind.clear()

    def before(self, question: str) -> tuple[str, Sequence[Unread]]:
        """The question with everything that goes before it, and its pictures in the order of their marks.

        First come the pictures (except those that have a mark in the question), then the texts, then the videos'
        frames.
        """
        first = max(len(self.pictures) - question.count(IMAGE_MARK), 0)
        frames = [frame for video in self.videos for frame in video]
        text = "".join([*self.texts, *map(frame_marks, self.videos), question])
        return text, [*self.pictures[:first], *frames, *self.pictures[first:]]

    def __str__(self) -> str:
        counts = {"picture": len(self.pictures), "text": len(self.texts), "video": len(self.videos)}
        parts = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
        if self.videos:
            frames = sum(map(len, self.videos))
            parts[-1] += f" ({frames} frame{'s' * (frames > 1)})"
        return ", ".join(parts)


def read_text(path: Path) -> str:
    """A whole text file, to put before a question. It always ends with a line break.

    Raises:
        UserError: naming ``path``: it is missing, empty, not UTF-8 (with the offset of the byte), or contains the mark
            for a picture (with the line).
    """
    content = read_bytes(path, MAX_TEXT)
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"{path}: not UTF-8 text: byte 0x{byte:02x} at offset {error.start}") from error
    text = text.removeprefix("\ufeff")  # some editors open a file with it
    if not text:
        raise UserError(f"{path}: the text file is empty")
    if IMAGE_MARK in text:
        line = text[: text.index(IMAGE_MARK)].count("\n") + 1
        raise UserError(f"{path}:{line}: contains '{IMAGE_MARK}', which marks a picture in a question")
    return text if text.endswith("\n") else f"{text}\n"
