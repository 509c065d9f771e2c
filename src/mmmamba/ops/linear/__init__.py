"""Linear maps: several of the same tokens side by side; and of a few tokens, with what comes before and after them.

A decoding step is mostly the latter. With one token or a few, a product reads its whole matrix and does few operations
for each element. What else the step does (norm, bias, residual, SwiGLU) is free if it is done in the same launch, and
a matrix of half the bytes takes half the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmmamba.ops.dispatch import SIZES, serves
from mmmamba.ops.linear.joined import joined_linear, linear_add
from mmmamba.ops.linear.reference import linear_step_torch
from mmmamba.ops.linear.shapes import check_shapes
from mmmamba.ops.linear.tuning import INT8_TOKENS, TOKENS, WIDEST
from mmmamba.ops.linear.wide import linear_wide
from mmmamba.ops.norm import rms_norm
from mmmamba.ops.swiglu import swiglu as gated

__all__ = [
    "joined_linear",
    "linear_add",
    "linear_step",
    "linear_step_torch",
    "linear_steps",
    "linear_wide",
    "quantize_rows",
]


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
            still to be divided by its root mean square (:func:`mmmamba.ops.mixer_step`). There is no norm then,
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
    check_shapes(x, weight, bias, scale, norm, squares, residual, swiglu)
    b, k = x.shape
    alike = (x if residual is None else residual).dtype == weight.dtype or scale is not None
    whole = squares is None or k // squares.shape[1] in SIZES["head_dim"]
    few = 1 <= b <= (TOKENS if scale is None else INT8_TOKENS) and k <= WIDEST
    if few and alike and whole and serves(x, weight, bias, scale, norm, residual):
        from mmmamba.ops.linear.kernels import linear_step as kernel

        return kernel(x, weight, bias, **options, chained=chained)
    return linear_step_torch(x, weight, bias, **options)


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
