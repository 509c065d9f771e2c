"""SiLU(gate) · up: what a SwiGLU network does between its matrices."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.triton import serves


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, both (…, n) of one dtype; the products in float32 at least where the kernel serves."""
    if gate.shape == up.shape and gate.dtype == up.dtype and serves(gate, up):
        from mmmamba.ops.triton.swiglu import swiglu as kernel

        return kernel(gate, up)
    return swiglu_torch(gate, up)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`swiglu`."""
    return F.silu(gate) * up
