"""Greedy tokens in PyTorch's operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def greedy_tokens_torch(logits: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operators. Same contract as :func:`greedy_tokens`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide if banned is None else wide.masked_fill(banned, -math.inf)
    tokens = scores.argmax(dim=-1)
    return tokens, wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(dim=-1)
