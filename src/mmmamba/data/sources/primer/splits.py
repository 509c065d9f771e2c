"""Which split a word, a number, a scene … belongs to: a stable hash decides, so splits can't share one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

SPLITS = ("train", "validation", "test")


def split_of(key: str) -> str:
    """The one split that may use ``key`` ("word:BAKO", "sum:3+17", …): 80 % train, 10 % validation, 10 % test."""
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def draw(split: str, propose: Callable[[], tuple[str, ...]], kind: str) -> tuple[str, ...]:
    """Propose until what came out belongs to ``split`` (about 10 tries for the small splits).

    The key hashed is ``kind`` and the strings in the order proposed: ``propose`` sorts them where order is no matter.
    """
    while True:
        parts = propose()
        if split_of(key_of(kind, parts)) == split:
            return parts


def key_of(kind: str, parts: tuple[str, ...]) -> str:
    return f"{kind}:{','.join(parts)}"
