"""The weighted squared error of stages 1 and 2, and nothing between its inputs and its gradient."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.squared_error.reference import squared_error_torch

__all__ = ["squared_error", "squared_error_torch"]


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
        from mmmamba.ops.squared_error.kernels import squared_error as kernel

        return kernel(predicted, target, weight)
    return squared_error_torch(predicted, target, weight)
