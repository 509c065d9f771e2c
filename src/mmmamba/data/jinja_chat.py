"""A chat template in Jinja: compiled once, rendered within a budget, given messages in the form that it reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.meta

from mmmamba.data.jinja_budget import OverBounds
from mmmamba.data.jinja_sandbox import MAX_SOURCE, BoundedEnvironment, render
from mmmamba.data.sample import IMAGE_MARK
from mmmamba.errors import UserError

Message = Mapping[str, Any]
_PROBE = "\ue000probe\ue001"
_BEFORE: Mapping[str, list[str]] = {"system": [], "user": [], "assistant": ["user"], "tool": ["user", "assistant"]}


class _TooMuch(UserError):
    """The template exceeds its budget, whatever the messages are."""


class ChatJinja:
    """One template.

    Args:
        source: the Jinja text.
        where: named in error messages.

    Raises:
        UserError: the text is not a template, or is too long.
    """

    def __init__(self, source: str, where: str) -> None:
        self._where = where
        self._takes: dict[tuple[str, str], bool] = {}
        if len(source) > MAX_SOURCE:
            raise UserError(f"{where}: the chat template is longer than {MAX_SOURCE:,} characters")
        self.source = source
        try:
            self._template = BoundedEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}: the chat template, line {error.lineno}: {_line(error.message)}") from error
        except Exception as error:  # such as nesting that the parser gives up on, or numbers with too many digits
            raise UserError(f"{where}: the chat template cannot be compiled ({_line(error)})") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads but does not define itself."""
        return frozenset(jinja2.meta.find_undeclared_variables(BoundedEnvironment().parse(self.source)))

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt for ``messages``. Their contents are first put into the form that the template reads.

        Args:
            variables: other names that the template may read: plain data.

        Raises:
            UserError: the template refuses the messages, or takes too long.
        """
        return self._rendered([self._in_form(message, variables) for message in messages], variables)

    def spans(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and the spans that ``{% generation %}`` marks: (start, end) in characters of the prompt."""
        given = json.dumps([list(messages), variables], default=str, ensure_ascii=False)
        start = next(mark for i in range(len(given) + 1) if (mark := f"\ue002{i}") not in given)
        end = start.replace("\ue002", "\ue003")
        shown = [self._in_form(message, variables) for message in messages]
        marked = self._rendered(shown, variables, (f"{start}\ue002", f"{end}\ue002"))
        text, found = "", []
        for part in re.split(f"({start}\ue002|{end}\ue002)", marked):
            if part == f"{start}\ue002":
                found.append((len(text), len(text)))
            elif part == f"{end}\ue002":
                found[-1] = (found[-1][0], len(text))
            else:
                text += part
        return text, found

    def takes(self, role: str, form: Literal["text", "parts"], variables: Mapping[str, Any]) -> bool:
        """Whether the template reads messages of ``role`` in this form: a text, or a list of parts (``{"type": "text",
        …}``).

        Some templates read both forms. Others read one, and for the other write nothing, or the list as Python prints
        it.
        """
        if (role, form) not in self._takes:
            content = _PROBE if form == "text" else [{"type": "text", "text": _PROBE}]
            before = _BEFORE.get(role, ["user"])
            after = ["user"] if role == "system" else []
            found = False
            for other in ("a", [{"type": "text", "text": "a"}]):
                roles = [*before, role, *after]
                messages = [{"role": r, "content": other} for r in roles]
                messages[len(before)] = {"role": role, "content": content}
                try:
                    text = self._rendered(messages, variables)
                except _TooMuch:
                    raise
                except UserError:
                    continue
                if found := _PROBE in text and not re.search(f"['\"]text['\"]: ['\"]{_PROBE}", text):
                    break
            self._takes[role, form] = found
        return self._takes[role, form]

    def _in_form(self, message: Message, variables: Mapping[str, Any]) -> Message:
        role, content = str(message.get("role")), message.get("content")
        if isinstance(content, str):
            if not self.takes(role, "text", variables) and self.takes(role, "parts", variables):
                return {**message, "content": [{"type": "text", "text": content}]}
        elif isinstance(content, (list, tuple)):
            if not self.takes(role, "parts", variables) and self.takes(role, "text", variables):
                return {**message, "content": flattened(content)}
        return message

    def _rendered(
        self, messages: Sequence[Message], variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")
    ) -> str:
        try:
            return render(self._template, {"messages": messages, **variables}, marks)
        except OverBounds as error:
            raise _TooMuch(f"{self._where}: the chat template {error}") from error
        except Exception as error:  # the template's code may raise anything
            self.refuse(f"does not take this conversation ({_line(error)})", error)

    def refuse(self, message: str, cause: BaseException | None = None) -> NoReturn:
        raise UserError(f"{self._where}: the chat template {message}") from cause


def flattened(parts: Sequence[Any]) -> str:
    """The parts of a message as one text. Each picture becomes a mark, on a separate line if something follows it."""
    text = ""
    for i, part in enumerate(parts):
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            text += IMAGE_MARK if i == len(parts) - 1 else f"{IMAGE_MARK}\n"
        else:
            text += str(part.get("text") or "") if isinstance(part, Mapping) else str(part)
    return text


def _line(error: object) -> str:
    """An error of foreign code as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:200])
    return shown + ("..." if len(text) > 200 else "")
