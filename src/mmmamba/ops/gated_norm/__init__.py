"""RMSNorm of each head times a SiLU gate, with statistics in float32."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.gated_norm.reference import gated_norm_torch

__all__ = ["gated_norm", "gated_norm_torch"]


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · weight · SiLU(gate): the published mixer's order, norm first. x, gate (…, p); weight (p,)."""
    if serves(x, gate, weight):
        from mmmamba.ops.gated_norm.kernels import gated_norm as kernel

        return kernel(x, gate, weight, eps)
    return gated_norm_torch(x, gate, weight, eps)
