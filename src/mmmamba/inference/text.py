"""Token ids to text while they arrive, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder puts where the bytes so far do not make a character


class Detokenizer:
    """Turns ids that come one by one into pieces of text whose concatenation is the text of all ids.

    A character may span several byte-level tokens, so text that ends in the replacement character is held back until
    the tokens that complete it have come. Only a window of the latest ids is decoded again at each token.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # ids before this one are out and no longer looked at
        self._shown = 0  # ids before this one are out

    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly none."""
        self._ids.append(token)
        text = self._unshown()
        return "" if text.endswith(UNFINISHED) else self._show(text)

    def flush(self) -> str:
        """What is held back, for when no more ids come."""
        return self._show(self._unshown())

    def _unshown(self) -> str:
        # The ids shown last stay in the window because some decoders join or strip spaces at the start of a text.
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _show(self, text: str) -> str:
        if text:  # ids that decode to nothing (special tokens) must not push real ones out of the window
            self._window, self._shown = self._shown, len(self._ids)
        return text
