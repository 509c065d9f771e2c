"""RMSNorm and unit length in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`rms_norm`."""
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    # Autocast would widen all of x first; the statistics alone are in float32 without it.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype or x.dtype)


def unit_norm_torch(x: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`unit_norm`."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        return (x / length.clamp_min(1e-12)).to(x.dtype)
