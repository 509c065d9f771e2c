"""Embedding and counting in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_step_torch(
    tokens: Tensor, slots: Tensor, weight: Tensor, counts: Tensor, *, special: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operators. Same contract as :func:`embed_step`."""
    if special is None:
        x = F.embedding(tokens, weight)
    else:
        x = F.embedding(tokens.clamp(max=len(weight) - 1), weight)
        own = F.embedding((tokens - len(weight)).clamp(min=0), special)
        x = torch.where((tokens >= len(weight))[:, None], own, x)
    there = slots >= 0
    places = slots.clamp(min=0)
    at = torch.where(there, counts[:, places], 0)
    counts.index_add_(1, places, there.to(counts.dtype).expand(len(counts), -1))
    return x, at
