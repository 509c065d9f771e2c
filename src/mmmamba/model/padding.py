"""Padding: taken out before the first layer, which reads one packed row, and put back after the last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding:
    """Where the real tokens of padded rows are.

    Args:
        mask: (b, l), non-zero for real tokens.

    Attributes:
        cu_seqlens: (b+1,) int32, borders of the rows in the packed row.
    """

    def __init__(self, mask: Tensor) -> None:
        real = mask != 0
        self.shape = real.shape
        self.kept = real.flatten().nonzero()[:, 0]
        self.cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    def remove(self, x: Tensor) -> Tensor:
        """(b, l, …) → the packed row (1, total, …)."""
        return x.flatten(0, 1).index_select(0, self.kept)[None]

    def restore(self, packed: Tensor) -> Tensor:
        """(1, total, …) back to (b, l, …), zeros at the padding."""
        out = packed.new_zeros(self.shape.numel(), *packed.shape[2:])
        return out.index_copy(0, self.kept, packed[0]).view(*self.shape, *packed.shape[2:])
