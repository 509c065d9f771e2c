"""The most likely token of each row of logits, and its log-probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmmamba.ops.triton import serves


def pick_greedy(logits: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token with the highest logit of each row, the first of several, and its log-probability.

    Args:
        logits: (b, v), in any order in memory.
        banned: (v,) bool, tokens that are not picked; they stay part of the distribution.

    Returns:
        tokens (b,) int64 and log-probabilities (b,) float32 at least. NaN among a row's logits makes the latter NaN.
    """
    if serves(logits, banned):
        from mmmamba.ops.triton.pick import pick_greedy as kernel

        return kernel(logits, banned)
    return pick_greedy_torch(logits, banned)


def pick_greedy_torch(logits: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operators. Same contract as :func:`pick_greedy`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide if banned is None else wide.masked_fill(banned, -math.inf)
    tokens = scores.argmax(dim=-1)
    return tokens, wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(dim=-1)
