"""A conversation that keeps the model's state from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mmmamba.data.chat_template import add_missing_marks
from mmmamba.data.lazy_pictures import Picture, PictureFile, Unread
from mmmamba.data.processor import UNSCORED, Encoded, Processor
from mmmamba.data.sample import GPT, HUMAN, Turn
from mmmamba.inference.model_fingerprint import fingerprint
from mmmamba.inference.sampling import Sampling
from mmmamba.inference.stream import Stream, stream
from mmmamba.model.model import Model
from mmmamba.model.state import State


@dataclass(frozen=True, kw_only=True)
class Past:
    """A conversation up to some moment, as a value. A conversation can continue from it; a session file holds one.

    Attributes:
        turns: all that was said, including the latest answer (or its part so far).
        state: the model's state. It has seen everything except ``unfed`` and the mark that ends the answer.
        unfed: the tokens of the latest answer that the state has not seen.
        answers: how many answers were begun. It is also the number of the random sequence for the next answer.
        shown: the pictures of all turns, if the chat template needs the whole conversation to be read again. Otherwise
            none, because the state holds what they showed.
    """

    turns: tuple[Turn, ...]
    state: State
    unfed: tuple[int, ...]
    answers: int
    shown: tuple[Image.Image | Unread, ...] = ()


class Chat:
    """A conversation with a model. At each question only the new turn is read; the state holds the rest.

    (Some models' chat templates change earlier turns when a conversation continues. Then all of it is read again.)

    Args:
        model: the network.
        processor: its processor.
        sampling: how tokens are picked; greedy by default. Turn i draws the random numbers of sequence i.
        max_new_tokens: longest answer.
        stop: texts that end an answer where they begin. What they cut off is not shown, but it counts as said: the
            state has seen it, and the next turn follows it.
        past: a conversation to continue; None begins a new one.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        past: Past | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.sampling = sampling or Sampling()
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.answer: Stream | None = None  # the latest answer that was begun here
        self.turns = 0 if past is None else past.answers
        self._resumed = past  # the conversation until an answer is begun here
        self._turns: tuple[Turn, ...] = ()  # all that was said before the latest answer
        self._shown: tuple[Image.Image | Unread, ...] = ()

    @property
    def past(self) -> Past | None:
        """The conversation at this moment. An answer that was left before its end counts as said up to there.

        None if nothing has been said.
        """
        if self.answer is None:
            return self._resumed
        said = Turn(GPT, self.processor.decode(self.answer.token_ids))
        return Past(
            turns=(*self._turns, said),
            state=self.answer.state,
            unfed=self.answer.unfed,
            answers=self.turns,
            shown=self._shown,
        )

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model and its processor. It is computed once, because it reads all parameters."""
        return fingerprint(self.model, self.processor)

    def ask(self, text: str, images: Sequence[Picture] = ()) -> Iterator[str]:
        """Pieces of the answer to ``text``, as they are generated.

        The question is read immediately, its pictures one by one. An earlier answer that was left before its end counts
        as said up to there. A question that cannot be read (a broken picture) does not change the conversation.

        Args:
            text: the question. ``<image>`` marks say where pictures are; pictures without a mark go before the text.
            images: PIL pictures, paths, :class:`PictureFile` or :class:`Frame`.
        """
        past, turn = self.past, Turn(HUMAN, text)
        pictures = [PictureFile.check(image, "chat") if isinstance(image, (str, Path)) else image for image in images]
        (marked,) = add_missing_marks([turn], len(pictures))
        turns = (marked,) if past is None else (*past.turns, marked)
        shown = tuple(pictures) if past is None else (*past.shown, *pictures)
        if past is not None and self.processor.appends:
            state, encoded = past.state, self._follow(past, turn, pictures)
        else:
            state, encoded = None, self.processor.prompt(turns, shown)
        self.answer = stream(
            self.model,
            self.processor,
            encoded,
            state=state,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop=self.stop,
            sequence=self.turns,
        )
        self.turns += 1
        self._turns, self._shown = turns, () if self.processor.appends else shown
        return iter(self.answer)

    def branch(self) -> Chat:
        """A second conversation that continues from this moment. Neither sees what is said in the other.

        The two share the state, because no pass changes it. So a long text is read once, and any number of branches can
        ask about it.
        """
        other = copy(self)
        other.answer, other._resumed = None, self.past
        return other

    def reset(self) -> None:
        """Forget the conversation."""
        self.answer = self._resumed = None
        self.turns = 0
        self._turns, self._shown = (), ()

    def _follow(self, past: Past, turn: Turn, images: Sequence[Picture]) -> Encoded:
        """What the state has not seen: the end of the answer, the mark that ends it, then the new turn.

        Whatever ended the answer (the model, the length limit, the user), the template closes it with its own mark.
        """
        encoded = self.processor.continuation(turn, images)
        ending = np.array([*past.unfed, self.processor.stop_token_ids[0]], dtype=encoded.input_ids.dtype)
        return replace(
            encoded,
            input_ids=np.concatenate([ending, encoded.input_ids]),
            labels=np.concatenate([np.full_like(ending, UNSCORED), encoded.labels]),
        )
