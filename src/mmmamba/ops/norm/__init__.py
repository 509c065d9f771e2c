"""RMSNorm, and unit length, over the last dimension, with statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.norm.reference import rms_norm_torch, unit_norm_torch

__all__ = ["rms_norm", "rms_norm_torch", "unit_norm", "unit_norm_torch"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) over the last dimension, times ``weight``; statistics in at least float32.

    The result is in ``dtype``, x's own when absent.
    """
    if serves(x, weight):
        from mmmamba.ops.norm.kernels import rms_norm as kernel

        return kernel(x, weight, eps, dtype or x.dtype)
    return rms_norm_torch(x, weight, eps, dtype)


def unit_norm(x: Tensor) -> Tensor:
    """x at unit length over the last dimension, x's dtype; the length in at least float32, and nothing else of it."""
    if serves(x):
        from mmmamba.ops.norm.kernels import unit_norm as kernel

        return kernel(x)
    return unit_norm_torch(x)
