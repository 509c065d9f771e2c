"""The gated norm in PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.norm import rms_norm_torch


def gated_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`gated_norm`."""
    return rms_norm_torch(x, weight, eps) * F.silu(gate)
