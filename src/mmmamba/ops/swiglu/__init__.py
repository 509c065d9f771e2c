"""SiLU(gate) · up: what a SwiGLU network does between its matrices."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.swiglu.reference import swiglu_torch

__all__ = ["swiglu", "swiglu_torch"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, both (…, n) of one dtype; the products in float32 at least where the kernel serves."""
    if gate.shape == up.shape and gate.dtype == up.dtype and serves(gate, up):
        from mmmamba.ops.swiglu.kernels import swiglu as kernel

        return kernel(gate, up)
    return swiglu_torch(gate, up)
