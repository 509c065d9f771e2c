"""The running batch: answers that grow together, each in its slot of one pool; they join and leave at any time.

The host launches a block of steps and reads what was picked at the end of it. Whatever a step needs to know of the one
before (the token, whether the answer has ended) stays on the device; an answer that ends inside a block is an idle row
for the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.inference.answer import Answer, Ending, unspeakable
from mmmamba.inference.decoder import Decoder
from mmmamba.inference.sampling import Sampler, Sampling
from mmmamba.inference.steps import Share, extent
from mmmamba.model.model import Model
from mmmamba.model.state import State


@dataclass(frozen=True, kw_only=True)
class _Row:
    """An answer in the batch: its slot, and how many tokens the pool held of it when it joined."""

    answer: Answer
    slot: int
    begun: int

    @property
    def held(self) -> int:
        """Tokens that the pool holds of it now: of the answer all but the last, which is fed in the next step."""
        return self.begun + max(len(self.answer.token_ids) - 1, 0)


class RunningBatch:
    """Answers under way in one pool.

    Args:
        model: the network.
        share: how large the pool is.
        sampling: how tokens are picked.
        ending: what ends an answer.
        block: most tokens of an answer that are picked before any is read.
    """

    def __init__(self, model: Model, share: Share, sampling: Sampling, ending: Ending, block: int) -> None:
        self._model, self._ending, self._block = model, ending, block
        # A block runs to its end, which may come after that of the longest answer in it.
        self._decoder = Decoder(model, share.slots, share.capacity + block, **share.fixed)
        self._sampler = Sampler(sampling, banned=unspeakable(model))
        self._stops = torch.tensor(sorted(ending.tokens), dtype=torch.long, device=model.device)
        self._rows: list[_Row] = []
        self._free = list(range(share.slots))
        self._slots = torch.empty(0, dtype=torch.long, device=model.device)  # (s,) of each row
        self._tokens = self._slots  # (going,) picked last and not fed yet, of the rows that have been stepped
        self._joined: list[Tensor] = []  # logits of the other rows, which have not

    @property
    def running(self) -> int:
        """How many answers are under way."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """How many more may join."""
        return len(self._free)

    def join(self, answers: Sequence[Answer], sequences: Sequence[int], logits: Tensor, state: State) -> None:
        """Begin answers whose prompts were read: logits (n, v) after them, a state of n sequences, in this order.

        ``sequences`` key their random draws.
        """
        slots = [self._free.pop() for _ in answers]
        admitted = torch.tensor(slots, device=self._model.device)
        self._decoder.admit(admitted, state)
        self._slots = torch.cat([self._slots, admitted])
        self._joined.append(logits)
        self._sampler.join(sequences)
        for answer, slot in zip(answers, slots, strict=True):
            self._rows.append(_Row(answer=answer, slot=slot, begun=extent(self._model, answer.prompt)))

    def advance(self) -> int:
        """Pick the next tokens of every answer, a block of them; how many answers ended. Those leave the batch.

        Raises:
            UserError: when the model gives NaN, naming the prompt and the token.
        """
        left = [self._ending.max_new_tokens - len(row.answer.token_ids) for row in self._rows]
        steps, slots = min(self._block, max(left)), self._slots
        limits = torch.tensor([min(count, steps) for count in left], device=slots.device)
        self._sampler.foresee(steps, slots.device)
        self._decoder.clear(max(row.held for row in self._rows))
        tokens, picked = self._tokens, []
        for step in range(steps):
            logits = self._decoder.step(tokens, slots) if step else self._first_logits()
            tokens, logprobs = self._sampler.pick(logits)
            picked.append((tokens, logprobs))
            ended = (tokens[:, None] == self._stops).any(1) | (limits <= step + 1)
            slots = torch.where(ended, -1, slots)
        all_tokens, all_logprobs = (torch.stack(part).tolist() for part in zip(*picked, strict=True))  # waits
        for step_tokens, step_logprobs in zip(all_tokens, all_logprobs, strict=True):
            for row, token, logprob in zip(self._rows, step_tokens, step_logprobs, strict=True):
                if row.answer.finish is None:
                    row.answer.add(token, logprob)
        return self._leave(tokens)

    def _first_logits(self) -> Tensor:
        """Logits (s, v) of each row's next token: from a step, or from the prefill where the row has just joined."""
        logits, self._joined = self._joined, []
        going = len(self._tokens)
        if going:
            logits.insert(0, self._decoder.step(self._tokens, self._slots[:going]))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _leave(self, tokens: Tensor) -> int:
        """Go on with the answers that have not ended, of all whose latest tokens (s,) these are."""
        going = [i for i, row in enumerate(self._rows) if row.answer.finish is None]
        ended = len(self._rows) - len(going)
        if ended:
            self._free += [row.slot for row in self._rows if row.answer.finish is not None]
            self._rows = [self._rows[i] for i in going]
            self._sampler.select(going)
            kept = torch.tensor(going, dtype=torch.long, device=tokens.device)
            self._slots, tokens = self._slots[kept], tokens[kept]
        self._tokens = tokens
        return ended
