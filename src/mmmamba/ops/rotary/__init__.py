"""Rotation of heads by given angles."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.rotary.reference import rotate_torch

__all__ = ["rotate", "rotate_torch"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (…, heads, p) by angles, given as cosines and sines (…, 1, p/2): first half paired with second.

    Angles get no gradient where the kernel serves, whose products are in float32.
    """
    each = x.ndim > 2 and cos.shape == (*x.shape[:-2], 1, x.shape[-1] // 2)  # an angle for each token: none is spread
    if each and serves(x, cos, sin):
        from mmmamba.ops.rotary.kernels import rotate as kernel

        return kernel(x, cos, sin)
    return rotate_torch(x, cos, sin)
