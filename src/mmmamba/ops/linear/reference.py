"""A linear step in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.norm import rms_norm
from mmmamba.ops.swiglu import swiglu as gated


def linear_step_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    norm: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """The same in PyTorch's operators, for any number of rows. Same contract as :func:`linear_step`."""
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if squares is not None and residual is not None:
        heads = squares.shape[1]
        inverse = (squares.sum(-1, keepdim=True) * heads / x.shape[1] + eps).rsqrt()
        x = (x.unflatten(1, (heads, -1)) * inverse).flatten(1).to(residual.dtype)
    if scale is not None:
        weight = (weight.to(torch.promote_types(x.dtype, scale.dtype)) * scale[:, None]).to(x.dtype)
    if residual is not None and bias is None:
        return residual.addmm_(x, weight.t())
    if bias is None and x.is_cuda and len(x) >= 8 and len(weight) % 8:
        # A vocabulary of odd size: results whose rows begin anywhere take several times as long as their transpose.
        y = torch.mm(weight, F.pad(x, (0, 0, 0, -len(x) % 8)).t()).t()[: len(x)]
    else:
        y = F.linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        return gated(gate, up)
    return y if residual is None else residual.add_(y)
