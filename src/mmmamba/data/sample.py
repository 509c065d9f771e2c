"""A training or test record after it is read: turns of text, and the pictures that they refer to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmmamba.errors import UserError

HUMAN = "human"
GPT = "gpt"
SYSTEM = "system"
ROLES = (HUMAN, GPT, SYSTEM)

#: Stands for a picture inside a human turn's text.
IMAGE_MARK = "<image>"


class BadSample(UserError):
    """A record that cannot be used. The message starts with ``file:line`` and names the field."""


class NothingScored(BadSample):
    """A conversation from which nothing can be learnt: it has no answer, or none within the maximum length."""


@dataclass(frozen=True)
class Turn:
    """One utterance. ``role`` is ``human``, ``gpt`` or ``system``; ``<image>`` marks count in human turns only."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One record: an optional system turn, then human and gpt turns that alternate.

    Attributes:
        images: paths of the pictures, absolute, in the order of their marks.
        where: ``file.jsonl:12``, for error messages.
        extra: every other key of the record (ability, choices, ...), as it was read.
        named: whether the record has an ``id``. If not, ``id`` is the number of its line.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    named: bool = True
