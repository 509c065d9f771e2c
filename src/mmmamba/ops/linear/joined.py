"""Linear maps with fewer passes over memory: several side by side, and one that adds to a residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.autocast import autocast_changes


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Several linear maps of x (…, k), their results side by side: (…, Σ n). Weights (n, k), biases (n,) or None.

    Without gradients each product is written where it belongs, and nothing is copied.
    """
    if autocast_changes(x, *weights):  # which copies the weights anyway: together, they are one product
        bias = None
        if any(one is not None for one in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([weight.new_zeros(len(weight)) if one is None else one for weight, one in pairs])
        return F.linear(x, torch.cat(tuple(weights)), bias)
    if torch.is_grad_enabled():
        return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(len(rows), sum(len(weight) for weight in weights))
    parts = out.split([len(weight) for weight in weights], dim=1)
    for weight, bias, part in zip(weights, biases, parts, strict=True):
        if bias is None:
            torch.mm(rows, weight.t(), out=part)
        else:
            torch.addmm(bias, rows, weight.t(), out=part)
    return out.view(*x.shape[:-1], out.shape[1])


def linear_add(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fresh: bool = False
) -> Tensor:
    """residual (…, n) + W·x + bias, for x (…, k): fewer passes over memory without gradients on a GPU.

    ``fresh``: nobody else has the residual, so that the sum may take its place.
    """
    if torch.is_grad_enabled() or autocast_changes(residual, x, weight) or not x.is_cuda or bias is not None:
        return residual + F.linear(x, weight, bias)
    n, k = weight.shape
    rows = residual.reshape(-1, n)
    add = rows.addmm_ if fresh else rows.addmm
    return add(x.reshape(-1, k), weight.t()).view_as(residual)
