"""The linear map of one token as one Triton kernel; the twin is ``mmmamba.ops.linear.linear_step_torch``.

The matrix is read once, at the rate of the memory. A program holds some whole rows of it: all its loads are in flight
before the first is used, and no loop waits. The row x, its norm's weight and its statistics are worked out by every
program anew, from the L2, while the matrix is on its way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.triton import on_device

ELEMENTS, WARPS = 8192, 4  # of the matrix, a program: eight loads of 16 bytes a thread


@triton.jit
def _dot_rows(weight, x, row, mask, column, K, N, bias):
    """W·x of some rows (r,), in float32."""
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    w = tl.load(weight + at, mask=mask[:, None] & (column < K)[None, :], other=0.0)
    y = tl.sum(w.to(tl.float32) * x[None, :], 1)
    if bias is not None:
        y += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _linear_kernel(
    x, weight, bias, norm, residual, out, K, N, EPS: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < N
    column = tl.arange(0, PAD)
    value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
        value = value * (1 / tl.sqrt(tl.sum(value * value, 0) / K + EPS)) * scale
        value = value.to(x.dtype.element_ty).to(tl.float32)  # as the product of a normed row reads it
    y = _dot_rows(weight, value, row, mask, column, K, N, bias)
    if SWIGLU:
        up = _dot_rows(weight + N.to(tl.int64) * K, value, row, mask, column, K, N, None if bias is None else bias + N)
        y = y * tl.sigmoid(y) * up
    if residual is not None:
        y += tl.load(residual + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row, y, mask=mask)


@torch.library.custom_op("mmmamba::linear_step", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    residual: Tensor | None,
    eps: float,
    swiglu: bool,
) -> Tensor:
    k, n = x.shape[1], weight.shape[0] // (2 if swiglu else 1)
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    pad = triton.next_power_of_2(k)
    rows = max(1, ELEMENTS // (2 if swiglu else 1) // pad)
    x, weight = x.contiguous(), weight.contiguous()
    rest = [None if t is None else t.contiguous() for t in (bias, norm, residual)]
    with on_device(x):
        _linear_kernel[(triton.cdiv(n, rows),)](
            x, weight, *rest, out, k, n, EPS=eps, ROWS=rows, PAD=pad, SWIGLU=swiglu, num_warps=WARPS
        )
    return out


@_linear.register_fake
def _(x, weight, bias, norm, residual, eps, swiglu):
    return x.new_empty(1, weight.shape[0] // (2 if swiglu else 1))


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """One row of :func:`mmmamba.ops.linear.linear_step`, whose contract this keeps."""
    if x.shape[0] != 1:
        raise ValueError(f"linear_step: the kernel takes one row, x has {x.shape[0]}")
    return _linear(x, weight, bias, norm, residual, eps, swiglu)
