"""The weighted squared error of stages 1 and 2, and nothing between its inputs and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.triton import serves


def squared_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum over tokens of weight · mean over channels of (predicted - target)², in float32 at least.

    Args:
        predicted: (t, c).  target: (t, c), which gets no gradient.  weight: (t,) float32, likewise.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if predicted.ndim != 2 or predicted.shape != target.shape or tuple(weight.shape) != (len(predicted),):
        shapes = tuple(predicted.shape), tuple(target.shape), tuple(weight.shape)
        raise ValueError("squared_error: predicted {}, target {} and weight {} do not fit".format(*shapes))
    if serves(predicted, target, weight):
        from mmmamba.ops.triton.error import squared_error as kernel

        return kernel(predicted, target, weight)
    return squared_error_torch(predicted, target, weight)


def squared_error_torch(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`squared_error`."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    error = (predicted.to(wide) - target.detach().to(wide)).square().mean(-1)
    return (error * weight.detach()).sum()
