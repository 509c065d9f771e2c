"""Prefill, decode and score: everything that turns prompts into tokens, for one prompt or many.

The engine knows token ids and tiles only; what a prompt looks like is the processor's business. All of it stands on one
property of the model: a state is a value with one row a sequence, and a prefill may be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mmmamba.data.processor import Encoded, Processor
from mmmamba.errors import UserError
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.likelihood import Score, score
from mmmamba.inference.sampling import Sampler, Sampling
from mmmamba.inference.steps import (
    BATCH_TOKENS,
    PREFILL_CHUNK,
    Progress,
    check_positive,
    groups,
    prefill,
)
from mmmamba.inference.text import Detokenizer
from mmmamba.model.model import Model
from mmmamba.model.state import State

__all__ = ["Generated", "Score", "Stream", "generate", "score", "stream"]

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One answer.

    Attributes:
        text: the decoded answer, without the stop token.
        token_ids: its tokens, without the stop token.
        logprobs: natural log-probability of each of these tokens under the model (before temperature and the like).
        finish: ``stop`` when the model ended the answer, ``length`` when ``max_new_tokens`` did.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


@dataclass
class _Answer:
    """An answer while it grows."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, token: int, logprob: float, stops: frozenset[int], max_new_tokens: int) -> None:
        if token in stops:
            self.finish = "stop"
            return
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if len(self.token_ids) >= max_new_tokens:
            self.finish = "length"


@torch.no_grad()
def generate(
    model: Model,
    processor: Processor,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int = 32,
    sampling: Sampling | None = None,
    batch_tokens: int = BATCH_TOKENS,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
) -> list[Generated]:
    """Answer every prompt; how the prompts are batched changes nothing but the rounding of their logits.

    Args:
        model: the network; its device and dtype are used.
        processor: decodes answers and knows which tokens end them.
        prompts: encoded prompts, each ending where the answer begins.
        max_new_tokens: longest answer.
        sampling: how tokens are picked; greedy by default. Prompt i draws the random numbers of sequence i.
        batch_tokens: most tokens (prompts and their longest answers) held at once.
        prefill_chunk: a longer prompt is read alone, in pieces of this size, to bound memory.
        progress: called with (answered, total) whenever that changes.

    Returns:
        One answer a prompt, in the order of the prompts.
    """
    check_positive(max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, prefill_chunk=prefill_chunk)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    stops = frozenset(processor.stop_token_ids)
    answers = [_Answer() for _ in prompts]
    done = 0
    decoder: Decoder | None = None
    for group in groups(model, lengths, extra=max_new_tokens, budget=batch_tokens, chunk=prefill_chunk):
        sampler = Sampler(sampling or Sampling(), group, banned=_unspeakable(model))
        logits, state = prefill(model, [prompts[i] for i in group], chunk=prefill_chunk, max_new_tokens=max_new_tokens)
        rows = list(group)  # which prompt each row of the batch belongs to
        slots = torch.arange(len(rows), device=model.device)
        decoder = _pool(decoder, model, len(rows), state.longest + max_new_tokens, state)
        decoder.admit(slots, state)
        del state  # the pool has its own copy
        while True:
            tokens = _pick(sampler, logits, [(answers[i], prompts[i]) for i in rows], stops, max_new_tokens)
            going = [row for row, i in enumerate(rows) if answers[i].finish is None]
            if len(going) < len(rows):
                done += len(rows) - len(going)
                if progress is not None:
                    progress(done, len(prompts))
                if not going:
                    break
                rows = [rows[row] for row in going]
                sampler.select(going)
                kept = torch.tensor(going, device=tokens.device)
                slots, tokens = slots[kept], tokens[kept]
            logits = decoder.step(tokens, slots)
    return [_generated(answer, processor) for answer in answers]


class Stream:
    """An answer that is generated while it is read: iterate over it for pieces of text.

    The prompt is prefilled when the stream is made. At any moment ``state`` has seen the whole sequence but the ids in
    ``unfed``. To carry the sequence on, whether the answer was read to its end or left half-way, start the next prompt
    with ``unfed``.

    Attributes:
        unfed: tokens of the answer that the state has not seen yet.
        token_ids, logprobs: the answer so far, without the stop token.
        finish: ``stop`` or ``length`` once the answer is complete, else None.
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
        sequence: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        check_positive(max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk)
        self._model = model
        self._stops = frozenset(processor.stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._prompt = encoded
        self._sampler = Sampler(sampling or Sampling(), [sequence], banned=_unspeakable(model))
        self._detokenizer = Detokenizer(processor.decode)
        self._answer = _Answer()
        self._logits: torch.Tensor | None  # of the next token, unless that token is already picked
        self._tokens: torch.Tensor  # (1,) the token picked last
        self._slot = torch.zeros(1, dtype=torch.long, device=model.device)
        self._decoder: Decoder | None = None  # made when a second token is wanted
        self.unfed: tuple[int, ...] = ()
        self._prefilled: State | None  # until there is a decoder
        with torch.no_grad():
            self._logits, self._prefilled = prefill(
                model, [encoded], chunk=prefill_chunk, max_new_tokens=max_new_tokens, state=state
            )

    @property
    def state(self) -> State:
        """What the model keeps of all tokens fed so far: a value, which no later token changes."""
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
            piece = self._next()
            if piece:
                yield piece
        rest = self._detokenizer.flush()
        if rest:
            yield rest

    @torch.no_grad()
    def _next(self) -> str:
        """Generate one token and return the text that it completes."""
        if self._logits is None:
            if self._decoder is None:
                state = self.state
                decoder = _pool(None, self._model, 1, state.longest + self._max_new_tokens, state)
                decoder.admit(self._slot, state)
                self._decoder, self._prefilled = decoder, None  # the pool has its own copy
            self._logits = self._decoder.step(self._tokens, self._slot)
            self.unfed = ()
        self._tokens = _pick(
            self._sampler, self._logits, [(self._answer, self._prompt)], self._stops, self._max_new_tokens
        )
        self._logits = None
        if self.finish == "stop":
            return ""
        self.unfed = (self._answer.token_ids[-1],)
        return self._detokenizer.push(self._answer.token_ids[-1])


def stream(
    model: Model,
    processor: Processor,
    encoded: Encoded,
    *,
    state: State | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    sequence: int = 0,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Stream:
    """Answer one prompt piece by piece: the tokens of ``generate``, as they come.

    Args:
        model: the network; its device and dtype are used.
        processor: decodes the answer and knows which tokens end it.
        encoded: the prompt, or what follows ``state``.
        state: carries an earlier sequence on (``Stream.state``; begin ``encoded`` with that stream's ``unfed``).
        max_new_tokens: longest answer.
        sampling: how tokens are picked; greedy by default.
        sequence: keys the random draws, as the position of a prompt does in ``generate``.
        prefill_chunk: a longer prompt is read in pieces of this size, to bound memory.
    """
    return Stream(
        model,
        processor,
        encoded,
        state=state,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        sequence=sequence,
        prefill_chunk=prefill_chunk,
    )


def _pool(decoder: Decoder | None, model: Model, slots: int, capacity: int, state: State) -> Decoder:
    """``decoder``, emptied, where that many sequences fit into it, else one with a little more room than asked for."""
    if decoder is None or not decoder.holds(slots, capacity, state.max_length):
        room = 1 << (slots - 1).bit_length()
        decoder = Decoder(model, room, capacity + capacity // 8, max_length=state.max_length)
    decoder.clear()
    return decoder


def _pick(
    sampler: Sampler,
    logits: torch.Tensor,
    rows: Sequence[tuple[_Answer, Encoded]],
    stops: frozenset[int],
    max_new_tokens: int,
) -> torch.Tensor:
    """Pick a token (s,) for each row of logits (s, v) and add it to the row's answer."""
    tokens, logprobs = sampler.pick(logits)
    for (answer, prompt), token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        if math.isnan(logprob):
            step = len(answer.token_ids)
            raise UserError(f"{prompt.where}: the model gives NaN at token {step} of its answer to '{prompt.id}'")
        answer.add(token, logprob, stops, max_new_tokens)
    return tokens


def _unspeakable(model: Model) -> tuple[int, ...]:
    """Tokens the model may not say: an image position stands for pixels, which an answer does not have."""
    token = model.config.img_context_token_id
    return (token,) if 0 <= token < model.config.vocab_size else ()


def _generated(answer: _Answer, processor: Processor) -> Generated:
    assert answer.finish is not None
    return Generated(
        text=processor.decode(answer.token_ids),
        token_ids=tuple(answer.token_ids),
        logprobs=tuple(answer.logprobs),
        finish=answer.finish,
    )
