"""Linear maps: several of the same tokens side by side; and of one token, with what stands before and behind it.

A decoding step is little else than the latter. With a token, or a few, a product reads its whole matrix for a few
operations an element. Whatever else the step does with them (norm, bias, residual, SwiGLU) is then free, if it is done
in the same launch; and a matrix of half the bytes takes half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmamba.ops.norm import rms_norm
from mmmamba.ops.swiglu import swiglu as gated
from mmmamba.ops.triton import SIZES, serves

WIDEST = 16_384  # inputs of a map: a program of the kernel holds whole rows
TOKENS = 2  # that the kernel serves: with more, the library's products are as good
INT8_TOKENS = 8  # the same of int8 weights, which the library has no product for


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (n, k) in int8, rounded to nearest, and the float32 scale (n,) of each row: weight ≈ int8 · scale.

    Symmetric: a row's largest magnitude becomes 127. A row of zeros has the scale 0.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / 127
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8), scale


def linear_step(
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
    chained: bool = False,
) -> Tensor:
    """residual + W·rms_norm(x) + bias; with ``swiglu``, SiLU(gate)·up of the two halves of its rows.

    Args:
        x: (b, k).  weight: (n, k), in x's dtype, or int8 with a ``scale``.  bias: (n,) or None.
        scale: (n,) float32 that each row of int8 weights is multiplied by (:func:`quantize_rows`).
        norm: (k,) weight of the RMSNorm in front, none when absent.  eps: of the norm.
        squares: (b, h, parts) sums of squares of the h heads that x is made of, in parts that add up: each head is
            still to be divided by its root mean square (:func:`mmmamba.ops.step.mixer_step`). There is no norm then,
            and there is a residual, whose dtype need not be x's.
        residual: (b, n) that is added to, in place; it is returned then.
        swiglu: ``weight`` holds n/2 rows of the gate, then n/2 of the other half; there is no residual then.
        chained: only x, its squares and the residual may come from the kernel that was launched last: on a GPU that
            can, the launch overlaps its end, and weights are on their way before x is there (programmatic dependent
            launch).

    Returns:
        (b, n), or (b, n/2) with ``swiglu``.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    options: dict[str, Any] = {
        "scale": scale, "norm": norm, "squares": squares, "eps": eps, "residual": residual, "swiglu": swiglu
    }  # fmt: skip
    (b, k), n = x.shape, weight.shape[0]
    expected = {
        "weight": (weight, (n, k)),
        "bias": (bias, (n,)),
        "scale": (scale, (n,)),
        "norm": (norm, (k,)),
        "residual": (residual, (b, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"linear_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if squares is not None:
        heads = squares.shape[1]
        if squares.ndim != 3 or len(squares) != b or not heads or k % heads:
            raise ValueError(f"linear_step: squares has shape {tuple(squares.shape)}, x {(b, k)}")
        if norm is not None or residual is None:
            raise ValueError("linear_step: squares stand for the norm, and need a residual")
    if swiglu and (n % 2 or residual is not None):
        raise ValueError("linear_step: swiglu needs an even number of rows and no residual")
    if (scale is None) != weight.is_floating_point():
        raise ValueError(f"linear_step: weight is {str(weight.dtype)[6:]}, a scale belongs to int8 and to nothing else")
    alike = (x if residual is None else residual).dtype == weight.dtype or scale is not None
    whole = squares is None or k // squares.shape[1] in SIZES["head_dim"]
    few = 1 <= b <= (TOKENS if scale is None else INT8_TOKENS) and k <= WIDEST
    if few and alike and whole and serves(x, weight, bias, scale, norm, residual):
        from mmmamba.ops.triton.linear import linear_step as kernel

        return kernel(x, weight, bias, **options, chained=chained)
    return linear_step_torch(x, weight, bias, **options)


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


def linear_steps(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
) -> Tensor:
    """:func:`linear_step` of matrices that lie apart, as if they were one: x (b, k), weights (n, k) → (b, Σ n).

    With ``swiglu`` there are two of one size, and the result is (b, n).
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    parts = [linear_step(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return gated(*parts) if swiglu else torch.cat(parts, dim=-1)


def _casts(*tensors: Tensor) -> bool:
    """Whether autocast would change the format of any of these, as it does before a product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return False
    return any(tensor.dtype != torch.get_autocast_dtype(device) for tensor in tensors)


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Several linear maps of x (…, k), their results side by side: (…, Σ n). Weights (n, k), biases (n,) or None.

    Without gradients each product is written where it belongs, and nothing is copied.
    """
    if _casts(x, *weights):  # which copies the weights anyway: together, they are one product
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
    if torch.is_grad_enabled() or _casts(residual, x, weight) or not x.is_cuda or bias is not None:
        return residual + F.linear(x, weight, bias)
    n, k = weight.shape
    rows = residual.reshape(-1, n)
    add = rows.addmm_ if fresh else rows.addmm
    return add(x.reshape(-1, k), weight.t()).view_as(residual)


def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """W·x for x (…, k), weight (n, k), in float32 at least: half-precision products are exact there.

    On a GPU nothing is copied into the wider format first, unless x is in float16 and gradients are wanted, which that
    format might not hold.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if splits(x) and torch.is_grad_enabled():
        rows = x.reshape(-1, x.shape[-1])
        return _WideProduct.apply(rows, weight).view(*x.shape[:-1], len(weight))
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
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
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
