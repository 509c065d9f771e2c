"""RMSNorm, RMSNorm times a SiLU gate, and unit length, with statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.triton import serves


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) over the last dimension, times ``weight``; statistics in at least float32.

    The result is in ``dtype``, x's own when absent.
    """
    if serves(x, weight):
        from mmmamba.ops.triton.rows import rms_norm as kernel

        return kernel(x, weight, eps, dtype or x.dtype)
    return rms_norm_torch(x, weight, eps, dtype)


def rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`rms_norm`."""
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    # Autocast would widen all of x first; the statistics alone are in float32 without it.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype or x.dtype)


def unit_norm(x: Tensor) -> Tensor:
    """x at unit length over the last dimension, x's dtype; the length in at least float32, and nothing else of it."""
    if serves(x):
        from mmmamba.ops.triton.rows import unit_norm as kernel

        return kernel(x)
    return unit_norm_torch(x)


def unit_norm_torch(x: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`unit_norm`."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return (x / length.clamp_min(1e-12)).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the next matrix product with ``x`` works in: autocast's, where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · weight · SiLU(gate): the published mixer's order, norm first. x, gate (…, p); weight (p,)."""
    if serves(x, gate, weight):
        from mmmamba.ops.triton.norm import gated_norm as kernel

        return kernel(x, gate, weight, eps)
    return gated_norm_torch(x, gate, weight, eps)


def gated_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`gated_norm`."""
    return rms_norm_torch(x, weight, eps) * F.silu(gate)
