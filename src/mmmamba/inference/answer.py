"""An answer: what ends it, how it grows, and what is returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmmamba.data.processor import Encoded, Processor
from mmmamba.errors import UserError
from mmmamba.inference.detokenizer import Detokenizer, StopStrings
from mmmamba.inference.steps import check_positive
from mmmamba.model.model import Model

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One answer.

    Attributes:
        text: the decoded answer, without the stop token, cut off before a stop string.
        token_ids: its tokens, without the stop token. If a stop string ended the answer, these are all tokens up to the
            one that completed the string. They decode to ``text``, the string, and the rest of the last token.
        logprobs: natural log-probability of each of these tokens under the model, before temperature and other options.
        finish: ``stop`` if the model or a stop string ended the answer, ``length`` if ``max_new_tokens`` did.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends an answer.

    Attributes:
        tokens: ids that end it and are not part of it.
        strings: texts that end it where they begin.
        max_new_tokens: the longest answer.

    Raises:
        UserError: a string is empty, or there is no room for a token.
    """

    tokens: frozenset[int]
    strings: tuple[str, ...] = ()
    max_new_tokens: int

    def __post_init__(self) -> None:
        check_positive(max_new_tokens=self.max_new_tokens)
        if "" in self.strings:
            raise UserError("a stop string must not be empty: it would end every answer before its first token")

    @classmethod
    def of(cls, processor: Processor, stop: Sequence[str], max_new_tokens: int) -> Ending:
        """An answer ends at the processor's stop tokens, at these strings, or at this length."""
        if isinstance(stop, str):
            raise UserError(f"stop must be a list of strings, such as [{stop!r}], not a single string")
        return cls(tokens=frozenset(processor.stop_token_ids), strings=tuple(stop), max_new_tokens=max_new_tokens)


class Answer:
    """An answer while it grows.

    Args:
        prompt: what is answered.
        ending: what ends the answer.
        decode: ids to text; without it the answer's text is not followed (nor any stop string found).

    Attributes:
        token_ids, logprobs: as :class:`Generated` has them, so far.
        finish: what ended the answer; None while it goes on.
    """

    def __init__(self, prompt: Encoded, ending: Ending, decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self.prompt, self.ending = prompt, ending
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self._detokenizer = None if decode is None else Detokenizer(decode)
        self._strings = StopStrings(ending.strings)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text that is decided, where it is followed."""
        return "".join(self._pieces)

    def add(self, token: int, logprob: float) -> str:
        """Take the next token; the text that it decides, possibly none.

        Raises:
            UserError: when the model gave NaN, naming the prompt and the step.
        """
        if math.isnan(logprob):
            where, step = f"{self.prompt.where}: the model gives NaN", len(self.token_ids)
            raise UserError(f"{where} at token {step} of its answer to '{self.prompt.id}'")
        if token in self.ending.tokens:
            self.finish = "stop"
        else:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            if len(self.token_ids) >= self.ending.max_new_tokens:
                self.finish = "length"
        piece = self._decided(token)
        if self._strings.found:
            self.finish = "stop"
        self._pieces.append(piece)
        return piece

    def _decided(self, token: int) -> str:
        if self._detokenizer is None:
            return ""
        piece = "" if token in self.ending.tokens else self._strings.push(self._detokenizer.push(token))
        if self.finish is None:
            return piece
        return piece + self._strings.push(self._detokenizer.flush()) + self._strings.flush()


def unspeakable(model: Model) -> tuple[int, ...]:
    """Tokens that an answer may not contain: an image position represents pixels, and an answer has none."""
    token = model.config.img_context_token_id
    return (token,) if 0 <= token < model.config.vocab_size else ()
