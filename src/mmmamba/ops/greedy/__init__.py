"""The most likely token of each row of logits, and its log-probability."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.greedy.reference import greedy_tokens_torch

__all__ = ["greedy_tokens", "greedy_tokens_torch"]


def greedy_tokens(logits: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the token with the highest logit of each row (the first of several), and its log-probability.

    Args:
        logits: (b, v), in any order in memory.
        banned: (v,) bool, tokens that are not chosen; they stay part of the distribution.

    Returns:
        tokens (b,) int64 and log-probabilities (b,) float32 at least. NaN among a row's logits makes the latter NaN.
    """
    if serves(logits, banned):
        from mmmamba.ops.greedy.kernels import greedy_tokens as kernel

        return kernel(logits, banned)
    return greedy_tokens_torch(logits, banned)
