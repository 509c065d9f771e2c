"""How a conversation becomes a prompt: the marks, the roles and the system message of our own templates.

``config.template`` names one of them. The name "tokenizer" stands for the Jinja template that came with the model's
tokenizer (:class:`mmmamba.data.tokenizer_template.JinjaTemplate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmmamba.data.patches import PATCH, PATCH_START, ROW_SEPARATOR
from mmmamba.data.sample import GPT, HUMAN, IMAGE_MARK, SYSTEM, Turn
from mmmamba.errors import UserError

OF_TOKENIZER = "tokenizer"
"""The value of ``config.template`` for a model whose tokenizer has the chat template."""

IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Piece:
    """A part of a prompt that is tokenised separately.

    A ``mark`` piece is a single special token. A ``text`` piece is plain text, whatever it looks like. An ``image``
    piece is replaced by the tokens of one picture, and has no text.
    """

    kind: str
    text: str = ""
    scored: bool = False


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format ``<start>role NEWLINE text<end>``, with nothing between turns.

    Attributes:
        adds_bos: whether ``bos_token_id`` is put before a conversation. If not, the template may write it.
    """

    adds_bos: ClassVar[bool] = True

    name: str
    system_message: str
    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    system_role: str = "system\n"
    user_role: str = "user\n"
    assistant_role: str = "assistant\n"

    def marks(self) -> tuple[str, ...]:
        """Every special token that a prompt may contain."""
        return (self.start, self.end, IMAGE_START, IMAGE_END, IMAGE_CONTEXT)

    def stop_marks(self) -> tuple[str, ...]:
        """The mark that ends an answer, then the other marks that cannot be part of one."""
        return (self.end, self.start)

    def appends(self, system_message: str | None) -> bool:
        """Whether a longer conversation only adds to the end of a shorter one."""
        return True

    def continuation(self, turn: Turn, system_message: str | None) -> list[Piece]:
        """What follows the end mark of an answer when the human says ``turn``, up to the next answer."""
        return self.pieces([turn], system_message="", reply=True)

    def pieces(self, turns: Sequence[Turn], *, system_message: str | None = None, reply: bool) -> list[Piece]:
        """The whole conversation. With ``reply``, the header of the assistant's next answer follows.

        Args:
            system_message: None for the template's own, "" for no system turn. A system turn in ``turns`` overrides
                both.
        """
        message = self.system_message if system_message is None else system_message
        if turns and turns[0].role == SYSTEM:
            message, turns = turns[0].text, turns[1:]
        pieces: list[Piece] = []
        if message:
            pieces += [Piece("mark", self.start), Piece("text", self.system_role + message), Piece("mark", self.end)]
        for turn in turns:
            pieces += self._answer(turn.text) if turn.role == GPT else self._question(turn.text)
        return pieces + (self.reply_header() if reply else [])

    def reply_header(self) -> list[Piece]:
        return [Piece("mark", self.start), Piece("text", self.assistant_role)]

    def _question(self, text: str) -> list[Piece]:
        return [Piece("mark", self.start), *with_images(self.user_role + text), Piece("mark", self.end)]

    def _answer(self, text: str) -> list[Piece]:
        # Header and answer are tokenised separately: in generation, the answer follows a finished header.
        scored = [Piece("text", text, scored=True)] if text else []
        return self.reply_header() + scored + [Piece("mark", self.end, scored=True)]


@dataclass(frozen=True, kw_only=True)
class SoloTemplate(Template):
    """``[INST] question [/INST] answer</s>`` (SOLO). A turn's pictures come before its text, and before ``<s>``.

    This is how the published fine-tuning code writes a sample with one picture. Nothing says what it does with more.
    There is no system message.
    """

    adds_bos: ClassVar[bool] = False

    def marks(self) -> tuple[str, ...]:
        return (self.start, self.end, PATCH_START, PATCH, ROW_SEPARATOR)

    def stop_marks(self) -> tuple[str, ...]:
        return (self.end,)

    def continuation(self, turn: Turn, system_message: str | None) -> list[Piece]:
        return self._question(turn.text)

    def pieces(self, turns: Sequence[Turn], *, system_message: str | None = None, reply: bool) -> list[Piece]:
        if system_message or (turns and turns[0].role == SYSTEM):
            raise UserError(f"the template '{self.name}' has no place for a system message")
        pieces = [piece for turn in turns for piece in self._turn(turn)]
        first = next((i for i, piece in enumerate(pieces) if piece.kind != "image"), len(pieces))
        return [*pieces[:first], Piece("mark", self.start), *pieces[first:]]

    def reply_header(self) -> list[Piece]:
        return []

    def _turn(self, turn: Turn) -> list[Piece]:
        return self._answer(turn.text) if turn.role == GPT else self._question(turn.text)

    def _question(self, text: str) -> list[Piece]:
        marks = text.count(IMAGE_MARK)
        for mark in (f"{IMAGE_MARK}\n", f"\n{IMAGE_MARK}", IMAGE_MARK):
            text = text.replace(mark, "")
        return [Piece("image")] * marks + [Piece("text", f"[INST] {text.strip()} [/INST]")]

    def _answer(self, text: str) -> list[Piece]:
        # The published code tokenises an answer separately, which puts a space before it.
        scored = [Piece("text", f" {text}", scored=True)] if text else []
        return [*scored, Piece("mark", self.end, scored=True)]


def with_images(text: str) -> list[Piece]:
    """A human's text as pieces, one of them for each ``<image>`` mark."""
    first, *rest = text.split(IMAGE_MARK)
    pieces = [Piece("text", first)]
    for after in rest:
        pieces.append(Piece("image"))
        if after:
            pieces.append(Piece("text", after))
    return pieces


def render(pieces: Sequence[Piece], image_tokens: Sequence[int] = ()) -> str:
    """The prompt as one string. ``image_tokens`` gives the number of ``<IMG_CONTEXT>`` for each picture, in order."""
    counts: Iterator[int] = iter(image_tokens)
    return "".join(
        IMAGE_START + IMAGE_CONTEXT * next(counts) + IMAGE_END if piece.kind == "image" else piece.text
        for piece in pieces
    )


def count_marks(turns: Sequence[Turn]) -> int:
    """The number of picture marks in human turns."""
    return sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == HUMAN)


def add_missing_marks(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """Add ``<image>`` lines before the first human turn, so that each of ``images`` pictures has a mark."""
    missing = images - count_marks(turns)
    if missing <= 0:
        return tuple(turns)
    first = next(i for i, turn in enumerate(turns) if turn.role == HUMAN)
    marked = Turn(HUMAN, f"{IMAGE_MARK}\n" * missing + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


_TEMPLATES = (
    Template(
        name="internlm2-chat",
        system_message=(
            "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
            "英文名叫InternVL, 是一个有用无害的人工智能助手。"
        ),
    ),
    SoloTemplate(name="solo", system_message="", start="<s>", end="</s>"),
)


def get_template(name: str) -> Template:
    """The template called ``name``."""
    for template in _TEMPLATES:
        if template.name == name:
            return template
    raise UserError(f"unknown template '{name}' (known: {', '.join(t.name for t in _TEMPLATES)})")
