"""Linear maps whose result is float32 at least, though their inputs are in half precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """W·x for x (…, k), weight (n, k), in float32 at least: half-precision products are exact there.

    On a GPU nothing is copied into the wider format first, unless x is in float16 and gradients are wanted, which that
    format might not hold.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if splits(x) and torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        result: Tensor = _WideProduct.apply(rows, weight)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], len(weight))
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if half and x.is_cuda and not torch.is_grad_enabled():
        product = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
        return product.view(*x.shape[:-1], len(weight))
    return F.linear(x.to(wide), weight.to(wide))


def splits(x: Tensor) -> bool:
    """Whether float32 weights are split for products with x: where the matrix units multiply bfloat16 into float32."""
    return x.is_cuda and x.dtype == torch.bfloat16


class _WideProduct(torch.autograd.Function):
    """x (m, k) in bfloat16 times Wᵀ (k, n), the result in float32, with gradients; for few rows of W, on a GPU.

    Float32 numbers are taken as the sum of two bfloat16 ones, so that the matrix units work at full speed and
    nothing is copied into the wider format: 16 bits of a weight count, where TF32 would keep 11.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _halves_back(torch.mm(x, _halves(weight, x.dtype, 0).t(), out_dtype=torch.float32), len(weight), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        parts, n = _halves(d, x.dtype, 1), len(weight)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            high = weight.to(x.dtype)
            dx = torch.mm(parts, torch.cat([high, high, high.new_zeros(parts.shape[1] - 2 * n, high.shape[1])]))
        if ctx.needs_input_grad[1]:
            dweight = _halves_back(torch.mm(parts.t(), x, out_dtype=torch.float32), n, 0).to(weight.dtype)
        return dx, dweight


def _halves(t: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """Two halves of ``t`` side by side along ``dim``, which add up to it, and zeros up to a multiple of 8."""
    high = t.to(dtype)
    low = (t - high).to(dtype)
    spare = list(t.shape)
    spare[dim] = -2 * t.shape[dim] % 8
    return torch.cat([high, low, high.new_zeros(spare)], dim)


def _halves_back(t: Tensor, n: int, dim: int) -> Tensor:
    """The sum of the two parts of n along ``dim``."""
    return t.narrow(dim, 0, n) + t.narrow(dim, n, n)
