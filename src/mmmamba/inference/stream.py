"""One answer, piece by piece while it is generated. At any moment its state can be continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from mmmamba.data.processor import Encoded, Processor
from mmmamba.device import within_memory
from mmmamba.errors import UserError
from mmmamba.inference.answer import Answer, Ending, Finish, unspeakable
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.interrupts import uninterrupted
from mmmamba.inference.sampling import Sampler, Sampling
from mmmamba.inference.steps import PREFILL_CHUNK, check_positive, prefill
from mmmamba.model.model import Model
from mmmamba.model.state import State


class Stream:
    """An answer that is generated while it is read. Iterate over it to get pieces of text.

    The prompt is prefilled when the stream is made. At any moment, ``state`` has seen the whole sequence except the ids
    in ``unfed``. To continue the sequence, start the next prompt with ``unfed``, whether the answer was read to its end
    or not. What a stop string cut off is part of the sequence, because the state has seen it.

    Attributes:
        unfed: tokens of the answer that the state has not seen yet.
        token_ids, logprobs: the answer so far, without the stop token, but with the tokens of a stop string.
        finish: ``stop`` or ``length`` when the answer is complete, else None.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        encoded: Encoded,
        *,
        state: State | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        sequence: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        check_positive(prefill_chunk=prefill_chunk)
        self._model = model
        self._answer = Answer(encoded, Ending.of(processor, stop, max_new_tokens), processor.decode)
        self._max_new_tokens = max_new_tokens
        self._sampler = Sampler(sampling or Sampling(), [sequence], banned=unspeakable(model))
        self._logits: torch.Tensor | None  # for the next token, unless it is already picked
        self._tokens: torch.Tensor  # (1,) the token picked last
        self._slot = torch.zeros(1, dtype=torch.long, device=model.device)
        self._decoder: Decoder | None = None  # made when a second token is wanted
        self._broken = False
        self.unfed: tuple[int, ...] = ()
        self._prefilled: State | None  # until there is a decoder
        read = partial(prefill, model, [encoded], chunk=prefill_chunk, max_new_tokens=max_new_tokens, state=state)
        doing = f"{len(encoded.input_ids):,} tokens were read: show less at once, or take another --device"
        with torch.no_grad():
            self._logits, self._prefilled = within_memory(read, model.device, doing)
        if bool(self._logits.isnan().any()):  # check now, before anybody continues from this state
            raise UserError(f"{encoded.where}: the model gives NaN at token 0 of its answer to '{encoded.id}'")

    @property
    def state(self) -> State:
        """The model's state after all tokens fed so far. It is a value: no later token changes it.

        UserError if an error interrupted a token: the state may then hold half of it.
        """
        self._check_whole()
        if self._decoder is not None:
            return self._decoder.export(self._slot)
        assert self._prefilled is not None
        return self._prefilled

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._answer.token_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        return tuple(self._answer.logprobs)

    @property
    def finish(self) -> Finish | None:
        return self._answer.finish

    def __iter__(self) -> Iterator[str]:
        while self.finish is None:
            with uninterrupted() as interrupt:
                piece = within_memory(self._next, self._model.device, f"token {len(self.token_ids)} was made")
            if piece:
                yield piece
            interrupt()

    def _check_whole(self) -> None:
        if self._broken:
            raise UserError("an answer broke off in the middle of a token: start a new conversation")

    @torch.no_grad()
    def _next(self) -> str:
        """Generate one token, completely or not at all, and return the text that is now certain."""
        self._check_whole()
        if self._logits is None and self._decoder is None:
            self._decode_from(self.state)
        self._broken = True  # until all is done
        piece = self._step()
        self._broken = False
        return piece

    def _decode_from(self, state: State) -> None:
        decoder = Decoder(
            self._model,
            1,
            state.longest + self._max_new_tokens,
            max_length=state.max_length,
            max_embedded=state.max_embedded,
        )
        decoder.admit(self._slot, state)
        self._decoder, self._prefilled = decoder, None  # the pool has its own copy

    def _step(self) -> str:
        if self._logits is None:
            assert self._decoder is not None
            self._logits = self._decoder.step(self._tokens, self._slot)
            self.unfed = ()
        self._tokens, logprobs = self._sampler.pick(self._logits)
        said = len(self._answer.token_ids)
        piece = self._answer.add(int(self._tokens), float(logprobs))
        self._logits = None
        self.unfed = tuple(self._answer.token_ids[said:])
        return piece


def stream(
    model: Model,
    processor: Processor,
    encoded: Encoded,
    *,
    state: State | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    sequence: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Stream:
    """Answer one prompt piece by piece. The tokens are those of ``generate``.

    Args:
        model: the network; its device and dtype are used.
        processor: decodes the answer and knows which tokens end it.
        encoded: the prompt, or what follows ``state``.
        state: continues an earlier sequence (``Stream.state``; begin ``encoded`` with that stream's ``unfed``).
        max_new_tokens: longest answer.
        sampling: how tokens are picked; greedy by default.
        stop: texts that end the answer where they begin. Text that may be the beginning of one is held back until that
            is decided.
        sequence: the number that keys the random draws, like the position of a prompt in ``generate``.
        prefill_chunk: a longer prompt is read in pieces of this size, to bound memory.
    """
    return Stream(
        model,
        processor,
        encoded,
        state=state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        sequence=sequence,
        prefill_chunk=prefill_chunk,
    )
