"""The rotation of heads in PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`rotate`."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
