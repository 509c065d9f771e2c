"""Turns token ids into text while they arrive, and never shows half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # a decoder writes it where the bytes so far do not make a character


class Detokenizer:
    """Turns ids that arrive one by one into pieces of text. Joined, the pieces are the text of all ids.

    A character may take several byte-level tokens. So text that ends in the replacement character is held back until
    its other tokens have arrived. At each token only a window of the latest ids is decoded again.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # ids before this one are shown, and are not decoded again
        self._shown = 0  # ids before this one are shown

    def push(self, token: int) -> str:
        """The text that ``token`` completes; it may be empty."""
        self._ids.append(token)
        text = self._unshown()
        return "" if text.endswith(UNFINISHED) else self._show(text)

    def flush(self) -> str:
        """The text that is held back. Call it when no more ids come."""
        return self._show(self._unshown())

    def _unshown(self) -> str:
        # The ids shown last stay in the window because some decoders join or strip spaces at the start of a text.
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _show(self, text: str) -> str:
        if text:  # ids without text (special tokens) must not push others out of the window
            self._window, self._shown = self._shown, len(self._ids)
        return text


class StopStrings:
    """Passes on text that arrives in pieces, up to the first stop string, wherever the pieces are cut.

    If several strings occur, the one that is complete first counts; if they end at the same place, the longest. Text
    that may be the beginning of a stop string is held back until that is decided.

    Args:
        strings: the stop strings; none may be empty.

    Attributes:
        found: whether a stop string has come. All text after it is dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.found or not piece:
            return ""
        text = self._held + piece
        starts = [(text.find(string), string) for string in self._strings]
        ends = [(start + len(string), start) for start, string in starts if start >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        begun = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._strings))
        shown = len(text) - next(begun, 0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text that is held back. Call it when no more text comes."""
        held, self._held = self._held, ""
        return held
