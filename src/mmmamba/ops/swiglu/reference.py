"""SwiGLU in PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`swiglu`."""
    return F.silu(gate) * up
