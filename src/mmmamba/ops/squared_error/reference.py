"""The weighted squared error in PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error_torch(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`squared_error`."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    error = (predicted.to(wide) - target.detach().to(wide)).square().mean(-1)
    return (error * weight.detach()).sum()
