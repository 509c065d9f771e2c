"""Messages as transformers' callers write them, as our turns of a conversation or as plain data for a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from mmmamba.data.chat_template import count_marks
from mmmamba.data.sample import GPT, HUMAN, IMAGE_MARK, SYSTEM, Turn
from mmmamba.errors import UserError
from mmmamba.hf.image_processing import flat

_ROLES = {"user": HUMAN, "assistant": GPT, "system": SYSTEM}

Message = Mapping[str, Any]


def turns_of(messages: Sequence[Message]) -> tuple[list[Turn], list[Any]]:
    """The turns of a conversation, with a mark for each picture in the text; and the pictures."""
    turns, images = [], []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES or (role == "system" and i > 0):
            raise UserError(f"message {i}: 'role' must be user or assistant (or system, first), got {role!r}")
        text = ""
        parts = [{"type": "text", "text": content or ""}] if not isinstance(content, (list, tuple)) else content
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            elif part.get("type") in ("image", "image_url") and role == "user":
                images.append(picture_of(part, i))
                text += IMAGE_MARK if part is parts[-1] else f"{IMAGE_MARK}\n"
            else:
                raise UserError(f"message {i}: a part must be text or, in a user's message, an image; got {part!r:.80}")
        turns.append(Turn(_ROLES[role], text))
    if count_marks(turns) != len(images):
        raise UserError(f"the messages have {count_marks(turns)} {IMAGE_MARK} marks for {len(images)} pictures")
    return turns, images


def picture_of(part: Message, message: int) -> Any:
    if (url := part.get("image_url")) is not None:
        return url["url"] if isinstance(url, Mapping) else url
    if (encoded := part.get("base64")) is not None:
        return encoded if str(encoded).startswith("data:") else f"data:image/png;base64,{encoded}"
    for source in ("image", "url", "path"):
        if part.get(source) is not None:
            return part[source]
    raise UserError(f"message {message}: an image part has no 'image', 'url', 'path' or 'base64'")


def as_mapping(entry: Any) -> Message:
    """A message, or a part of one, as a dict. It may be given as an object (a dataclass, a pydantic model)."""
    if isinstance(entry, str):
        raise UserError(f"a message must have a role and a content, got {entry!r:.80}")
    found = entry
    if not isinstance(entry, Mapping):
        fields = (
            entry.model_dump() if hasattr(entry, "model_dump") else vars(entry) if hasattr(entry, "__dict__") else {}
        )
        found = {name: value for name, value in fields.items() if value is not None}
    if isinstance(content := found.get("content"), (list, tuple)):
        found = {
            **found,
            "content": [part if isinstance(part, (str, Mapping)) else as_mapping(part) for part in content],
        }
    return dict(found)


def plain_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages as plain data for a template, without the pictures; and the pictures.

    A template is foreign code: it could call the methods of any object it gets.
    """
    found, images = [], []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind in ("image", "image_url"):
                    images.append(picture_of(part, i))
                    named = {"url": images[-1], **part}
                    parts.append(
                        {n: named[n] for n in ("url", "path") if isinstance(named.get(n), str)} | {"type": "image"}
                    )
                elif kind == "text" and isinstance(part.get("text"), str):
                    parts.append(dict(part))
                else:
                    raise UserError(f"message {i}: a part must be text or an image; got {part!r:.80}")
            content = parts
        texts = [part.get("text", "") for part in content] if isinstance(content, list) else [content]
        if any(isinstance(text, str) and IMAGE_MARK in text for text in texts):
            raise UserError(f"message {i}: {IMAGE_MARK} in a text: give pictures as parts of a message")
        found.append({**message, "content": content})
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"messages must be plain data ({error})") from error
    return found, images


def tool_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """Tools as JSON. A function is described by its signature and docstring, as in transformers."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise UserError("tools must be a list of functions or of JSON schemas")
    found = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    try:
        return list(json.loads(json.dumps(found)))
    except (TypeError, ValueError) as error:
        raise UserError(f"tools must be functions or plain data ({error})") from error


def left_open(prompt: str, messages: Sequence[Message]) -> str:
    """The prompt up to the end of the last message's text."""
    content = messages[-1].get("content")
    if isinstance(content, (list, tuple)):
        content = next((part["text"] for part in reversed(content) if part.get("type") == "text"), None)
    for text in (content, content.strip()) if isinstance(content, str) else ():
        at = prompt.rfind(text)
        if text and at >= 0:
            return prompt[: at + len(text)]
    raise UserError("continue_final_message: the prompt does not hold the last message's text as it is")


def share_out(images: Any, texts: Sequence[str], *, single: bool, marks: Sequence[str]) -> list[list[Any]]:
    """Give each text as many of the pictures as it has ``marks``."""
    counts = [sum(text.count(mark) for mark in marks) for text in texts]
    nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
    if single or not nested:
        pool = flat(images)
        if not single and sum(counts) != len(pool):
            raise UserError(f"the texts have {sum(counts)} {IMAGE_MARK} marks for {len(pool)} pictures")
        shown = [pool] if single else [[pool.pop(0) for _ in range(count)] for count in counts]
    elif len(images) != len(texts):
        raise UserError(f"pictures are given for {len(images)} texts, there are {len(texts)}")
    else:
        shown = [flat(entry) for entry in images]
    for i, (count, pictures) in enumerate(zip(counts, shown, strict=True)):
        if count != len(pictures):
            raise UserError(f"text {i} has {count} {IMAGE_MARK} marks for {len(pictures)} pictures")
    return shown
