"""How the next token is picked from the logits: greedy, or drawn with temperature, top-k and top-p.

Every random number is a pure function of (seed, sequence, step) (:mod:`mmmamba.inference.philox`). So a sequence draws
the same numbers in any batch, and the seed alone repeats a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmmamba.errors import UserError
from mmmamba.inference.philox import uniforms
from mmmamba.ops import greedy_tokens

AHEAD = 16  # picks whose random numbers are made together, if nobody says how many there will be


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token (greedy); 1 draws from the model's own distribution.
        top_k: draw only among the k most likely tokens.
        top_p: draw only among the most likely tokens that together have this probability.
        repetition_penalty: above 1, makes tokens less likely that are already in this answer (also when greedy).
        seed: which random numbers are drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty must be positive (1 turns it off), got {self.repetition_penalty}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed must lie between 0 and 2^64 - 1, got {self.seed}")


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Tokens (s,) drawn from logits (s, v) by inverting the cumulative distribution at uniforms (s,) in [0, 1)."""
    # float64, because a float32 cumulative sum over ~100k tokens loses the tail that u near 1 must reach.
    scaled, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        scaled, order = scaled[:, : sampling.top_k], order[:, : sampling.top_k]
    probabilities = scaled.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if sampling.top_p is not None:
        # A token stays if the ones before it have less than top_p in total, so the first always stays.
        outside = cumulative - probabilities >= sampling.top_p
        cumulative = probabilities.masked_fill(outside, 0).cumsum(dim=-1)
    # side="right" never lands on a token of probability 0: cumulative rises only at tokens that may be drawn, and the
    # target stays below the total even when u is rounded up to it. The clamp is for NaN logits, which a caller reports.
    total = cumulative[:, -1:]
    targets = torch.minimum(uniforms.to(cumulative)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    picked = torch.searchsorted(cumulative, targets, right=True).clamp_(max=order.shape[-1] - 1)
    return order.gather(-1, picked)[:, 0]


class Sampler:
    """Picks one token for each row, and remembers what each row's next pick depends on.

    No pick waits for the device, so many can be running before the first is read.

    Args:
        sampling: how tokens are drawn.
        sequences: the number that keys each row's random draws.
        banned: token ids that are never picked.
    """

    def __init__(self, sampling: Sampling, sequences: Sequence[int] = (), banned: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.banned = torch.tensor(list(banned), dtype=torch.long)
        self._barred: torch.Tensor | None = None  # (v,) bool, the same ids as a mask
        self._sequences = np.array(list(sequences), np.uint64)  # what keys each row's next draw, with
        self._steps = np.zeros_like(self._sequences)  # how many it has made
        self._uniforms: list[torch.Tensor] = []  # (s,) float64 for each of the next picks made so far
        self._seen: torch.Tensor | None = None  # (s, v) bool, which tokens a row's answer already holds

    def pick(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (s,) for logits (s, v), and their log-probabilities (s,) under the model's own distribution."""
        if len(self.banned) and self._barred is None:
            barred = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill(0, self.banned, True)
            self._barred = barred.to(logits.device)
        if self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1:
            tokens, logprobs = greedy_tokens(logits, self._barred)
        else:
            tokens, logprobs = self._pick(logits.float())
        self._steps += np.uint64(1)
        return tokens, logprobs

    def _pick(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick with a penalty or at random, from float32 logits (s, v)."""
        scores = self._penalise(logits)
        if self._barred is not None:
            scores = scores.masked_fill(self._barred, -math.inf)
        if self.sampling.temperature == 0:
            tokens = scores.argmax(dim=-1)
        else:
            if not self._uniforms:
                self.foresee(AHEAD, scores.device)
            tokens = draw(scores, self._uniforms.pop(0), self.sampling)
        if self._seen is not None:
            self._seen.scatter_(-1, tokens[:, None], True)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)

    def foresee(self, picks: int, device: torch.device) -> None:
        """Make the random numbers of the next ``picks`` picks, and send them to the device together."""
        if self.sampling.temperature == 0:
            return
        steps = self._steps + np.arange(picks, dtype=np.uint64)[:, None]  # (picks, s)
        self._uniforms = list(torch.from_numpy(uniforms(self.sampling.seed, self._sequences, steps)).to(device))

    def join(self, sequences: Sequence[int]) -> None:
        """Add rows for these sequences after the existing rows. They are at their first step."""
        self._sequences = np.concatenate([self._sequences, np.array(list(sequences), np.uint64)])
        self._steps = np.concatenate([self._steps, np.zeros(len(sequences), np.uint64)])
        self._uniforms = []

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self._sequences, self._steps = self._sequences[list(rows)], self._steps[list(rows)]
        self._uniforms = []
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
        elif len(self._seen) < len(logits):  # rows that have joined since the last pick
            missing = len(logits) - len(self._seen)
            self._seen = torch.cat([self._seen, self._seen.new_zeros(missing, logits.shape[-1])])
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
