"""Which dtype autocast makes a matrix product work in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the next matrix product with ``x`` works in: autocast's, where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def autocast_changes(*tensors: Tensor) -> bool:
    """Whether autocast would change the format of any of these, as it does before a product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return False
    return any(tensor.dtype != torch.get_autocast_dtype(device) for tensor in tensors)
