"""The Jinja chat template that came with a model's tokenizer, as a template that makes prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from mmmamba.data.chat_template import OF_TOKENIZER, Piece, with_images
from mmmamba.data.jinja_chat import ChatJinja
from mmmamba.data.sample import GPT, HUMAN, SYSTEM, Turn

#: For models without a chat template (base models): a line with the speaker, then the text, then an empty line.
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'User:\n' + message.content + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + message.content + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

_ROLES = {HUMAN: "user", GPT: "assistant", SYSTEM: "system"}
_SLOT = re.compile("\ue000(\\d+)\ue001")  # takes the place of a turn's text; nothing trims or escapes these characters


class JinjaTemplate:
    """The chat template of a tokenizer, rendered in a sandbox, with the result that transformers gives.

    First the conversation is rendered with a slot in place of each turn's text. The text around the slots comes from
    the template, and only there do special tokens count. What is put into the slots is plain text. A second rendering,
    with the texts, shows what the template does with them. It may trim them; a template that changes them in another
    way is refused. So the prompt is the one of transformers, with one exception: an answer is never trimmed, because
    what was generated must be exactly what is read again.

    Without a system turn the template uses its default. There is no ``strftime_now``: a prompt must not depend on the
    date.

    Args:
        source: the Jinja text.
        tokens: ``bos_token``, ``eos_token``, …, which the template may name.
        specials: every special token of the tokenizer.
        where: named in error messages.
        others: its added tokens that are not special. They are ordinary text, but may end an answer.
    """

    adds_bos: ClassVar[bool] = False
    name: ClassVar[str] = OF_TOKENIZER

    def __init__(
        self, source: str, tokens: Mapping[str, str], specials: Sequence[str], where: str, others: Sequence[str] = ()
    ) -> None:
        self._arguments = (source, dict(tokens), tuple(specials), where, tuple(others))
        self._where = where
        self._tokens = dict(tokens)
        self._specials = frozenset(specials)
        self._marks = _any_of(self._specials)
        self._ends = _any_of({*self._specials, *(token for token in others if not token.isspace())})
        self._jinja = ChatJinja(source, where)
        self._headers: dict[bool, str] = {}
        self._appends: dict[str | None, bool] = {}

    def __reduce__(self) -> tuple[type[JinjaTemplate], tuple[Any, ...]]:
        return (JinjaTemplate, self._arguments)  # a compiled template can't be pickled

    @property
    def definition(self) -> str:
        """Everything that decides the prompt of a conversation, for a fingerprint."""
        return json.dumps(self._arguments[:3])

    def marks(self) -> tuple[str, ...]:
        """Every special token that a prompt may contain."""
        return tuple(sorted(self._specials))

    def stop_marks(self) -> tuple[str, ...]:
        """The added token that ends an answer, then the special tokens up to the next question."""
        literals, order = self._slots([Turn(HUMAN, ""), Turn(GPT, ""), Turn(HUMAN, "")], reply=True)
        between = self._ends.findall(literals[order.index(1) + 1]) if self._ends else []
        return tuple(dict.fromkeys([*between[:1], *(mark for mark in between if mark in self._specials)]))

    def pieces(self, turns: Sequence[Turn], *, system_message: str | None = None, reply: bool) -> list[Piece]:
        """The whole conversation. With ``reply``, the header of the assistant's next answer follows.

        Args:
            system_message: None for the template's own. An empty one becomes an empty system turn. A system turn in
                ``turns`` overrides both.

        Raises:
            UserError: the template refuses the conversation, or rewrites the text of a turn.
        """
        if system_message is not None and not (turns and turns[0].role == SYSTEM):
            turns = (Turn(SYSTEM, system_message), *turns)
        literals, order = self._slots(turns, reply)
        texts = self._written(turns, literals, order, reply)
        header = self._header(turns[0].role == SYSTEM)
        built = _Builder(self._marks)
        answered = False
        for literal, index in zip(literals, [*order, None], strict=True):
            if answered:  # what ends an answer is scored with it
                end = self._ends.search(literal) if self._ends else None
                built.literal(literal[: end.end()] if end else "", scored=True)
                literal = literal[end.end() :] if end else literal
            turn = None if index is None else turns[index]
            answered = turn is not None and turn.role == GPT
            # A prompt ends with a header. What the template writes between this header and the answer, the model must
            # say.
            known = len(header) if answered and literal.startswith(header) else len(literal)
            built.literal(literal[:known], scored=False)
            built.literal(literal[known:], scored=True)
            if turn is not None and index is not None:
                built.turn(turn if answered else replace(turn, text=texts[index]))
        return built.pieces

    def reply_header(self) -> list[Piece]:
        built = _Builder(self._marks)
        built.literal(self._header(False), scored=False)
        return built.pieces

    def appends(self, system_message: str | None) -> bool:
        """Whether a longer conversation only adds to the end of a shorter one, so that a state can be carried on.

        Then the prompt, the answer with its end mark, and :meth:`continuation` together are the prompt of the longer
        conversation. This fails if a template writes past answers in another form than new ones, or moves the system
        message.
        """
        if system_message not in self._appends:
            self._appends[system_message] = self._grows(system_message)
        return self._appends[system_message]

    def continuation(self, turn: Turn, system_message: str | None) -> list[Piece]:
        """What follows the end mark of an answer when the human says ``turn``, up to the next answer."""
        turns = [Turn(HUMAN, "a"), Turn(GPT, "b"), turn]
        pieces = self.pieces(turns, system_message=system_message, reply=True)
        return pieces[max(i for i, piece in enumerate(pieces) if piece.scored) + 1 :]

    def _grows(self, system_message: str | None) -> bool:
        question, answer = Turn(HUMAN, "a"), Turn(GPT, "b")
        longer = [
            self.pieces([question, answer] * rounds + [question], system_message=system_message, reply=True)
            for rounds in range(3)
        ]
        marks = self.stop_marks()
        if not marks:
            return False
        said = [Piece("text", answer.text, scored=True), Piece("mark", marks[0], scored=True)]
        more = said + self.continuation(question, system_message)
        return all(longer[i] + more == longer[i + 1] for i in range(2))

    def _header(self, system: bool) -> str:
        """The end of a prompt, after the question, with or without a system turn."""
        if system not in self._headers:
            turns = [Turn(SYSTEM, "s")] * system + [Turn(HUMAN, "a")]
            self._headers[system] = self._slots(turns, reply=True)[0][-1]
        return self._headers[system]

    def _slots(self, turns: Sequence[Turn], reply: bool) -> tuple[list[str], list[int]]:
        """The template's own text (n + 1 parts) around the texts of the turns, and the order of the turns."""
        rendered = self._render([replace(turn, text=f"\ue000{i}\ue001") for i, turn in enumerate(turns)], reply)
        parts = _SLOT.split(rendered)
        order = [int(index) for index in parts[1::2]]
        for i, turn in enumerate(turns):
            if order.count(i) != 1:
                self._refuse(f"writes turn {i} ({turn.role}) {order.count(i)} times instead of once")
        return parts[::2], order

    def _written(
        self, turns: Sequence[Turn], literals: Sequence[str], order: Sequence[int], reply: bool
    ) -> dict[int, str]:
        """What the template writes for the text of each turn: the text, or the trimmed text.

        Anything else is refused.
        """
        rendered = self._render(turns, reply)
        texts: dict[int, str] = {}
        position = len(literals[0]) if rendered.startswith(literals[0]) else len(rendered) + 1
        for literal, index in zip(literals[1:], order, strict=True):
            text = turns[index].text
            for written in (text, text.strip(), text.lstrip(), text.rstrip()):
                if rendered.startswith(written + literal, position):
                    texts[index] = written
                    position += len(written) + len(literal)
                    break
            else:
                self._refuse(f"rewrites the text of turn {index} ({turns[index].role})")
        if position != len(rendered):
            self._refuse("writes another prompt for these texts than for others")
        return texts

    def _render(self, turns: Sequence[Turn], reply: bool) -> str:
        messages = [{"role": _ROLES[turn.role], "content": turn.text} for turn in turns]
        return self._jinja.render(messages, add_generation_prompt=reply, tools=None, documents=None, **self._tokens)

    def _refuse(self, message: str) -> NoReturn:
        self._jinja.refuse(message)


def _any_of(marks: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of ``marks``, the longest first. None if there are no marks."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


class _Builder:
    """Collects pieces. Neighbouring texts are joined, so that they are tokenised together."""

    def __init__(self, marks: re.Pattern[str] | None) -> None:
        self.pieces: list[Piece] = []
        self._marks = marks

    def literal(self, text: str, *, scored: bool) -> None:
        """Add text of the template, in which special tokens count."""
        parts = self._marks.split(text) if self._marks else [text]
        for i, part in enumerate(parts):
            if i % 2:
                self.pieces.append(Piece("mark", part, scored))
            else:
                self._text(part, scored)

    def turn(self, turn: Turn) -> None:
        """Add the text of a turn, which is plain."""
        for piece in with_images(turn.text) if turn.role == HUMAN else [Piece("text", turn.text)]:
            if piece.kind == "text":
                self._text(piece.text, turn.role == GPT)
            else:
                self.pieces.append(piece)

    def _text(self, text: str, scored: bool) -> None:
        last = self.pieces[-1] if self.pieces else None
        if text and last is not None and (last.kind, last.scored) == ("text", scored):
            self.pieces[-1] = replace(last, text=last.text + text)
        elif text:
            self.pieces.append(Piece("text", text, scored))
