"""Rotation of heads by given angles."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.triton import serves


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (…, heads, p) by angles, given as cosines and sines (…, 1, p/2): first half paired with second.

    Angles get no gradient where the kernel serves, whose products are in float32.
    """
    each = x.ndim > 2 and cos.shape == (*x.shape[:-2], 1, x.shape[-1] // 2)  # an angle for each token: none is spread
    if each and serves(x, cos, sin):
        from mmmamba.ops.triton.rope import rotate as kernel

        return kernel(x, cos, sin)
    return rotate_torch(x, cos, sin)


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`rotate`."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
