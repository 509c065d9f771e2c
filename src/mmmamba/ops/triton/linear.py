"""The linear map of one token as one Triton kernel; the twin is ``mmmamba.ops.linear.linear_step_torch``.

The matrix is read once, at the rate of the memory. A program holds some whole rows of it: all its loads are in flight
before the first is used, and no loop waits. In a chain of launches (programmatic dependent launch) they are in flight
before the kernel in front has ended. The row x, its norm's weight and its statistics are worked out by every program
anew, from the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.ops.triton import chain, on_device

BYTES, WARPS = 16384, 4  # of the matrix, a program: eight loads of 16 bytes a thread


@triton.jit
def _rows(weight, row, mask, column, K):
    """Whole rows of a matrix, (r, PAD)."""
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    return tl.load(weight + at, mask=mask[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def _product(w, x, inverse, row, mask, scale, bias):
    """W·x of some rows (r,), times ``inverse``, in float32."""
    y = tl.sum(w.to(tl.float32) * x[None, :], 1) * inverse
    if scale is not None:
        y *= tl.load(scale + row, mask=mask, other=0.0)
    if bias is not None:
        y += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _linear_kernel(
    x, weight, scale, bias, norm, squares, residual, out, K, N, EPS: tl.constexpr, ROWS: tl.constexpr,
    PAD: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, SWIGLU: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    if CHAINS:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < N
    column = tl.arange(0, PAD)
    w = _rows(weight, row, mask, column, K)
    if SWIGLU:
        w_up = _rows(weight + N.to(tl.int64) * K, row, mask, column, K)
    if norm is not None:
        shape = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    if CHAINS:
        gdc_wait()  # what follows reads what the kernel in front has written
    inverse = 1.0
    if squares is not None:  # heads of P channels, each with its own statistics
        head = tl.arange(0, PAD // P)
        at = head[:, None] * P + tl.arange(0, P)[None, :]
        parts = head[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
        square = tl.sum(tl.load(squares + parts, mask=(head < K // P)[:, None], other=0.0).to(tl.float32), 1)
        value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        value = tl.reshape(value * (1 / tl.sqrt(square / P + EPS))[:, None], (PAD,))
    else:
        value = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    if norm is not None:  # a row's products are linear in its norm: they need not wait for it
        inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / K + EPS)
        value *= shape
    y = _product(w, value, inverse, row, mask, scale, bias)
    if SWIGLU:
        up = _product(
            w_up, value, inverse, row, mask, None if scale is None else scale + N, None if bias is None else bias + N
        )
        y = y * tl.sigmoid(y) * up
    if residual is not None:
        y += tl.load(residual + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row, y, mask=mask)


@torch.library.custom_op("mmmamba::linear_step", mutates_args=("out",))
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    squares: Tensor | None,
    out: Tensor,
    eps: float,
    add: bool,
    swiglu: bool,
    chained: bool,
) -> None:
    k, n = x.shape[1], weight.shape[0] // (2 if swiglu else 1)
    pad = triton.next_power_of_2(k)
    rows = max(1, BYTES // weight.element_size() // (2 if swiglu else 1) // pad)
    x, weight = x.contiguous(), weight.contiguous()
    scale, bias, norm, squares = (None if t is None else t.contiguous() for t in (scale, bias, norm, squares))
    heads, parts = (1, 1) if squares is None else squares.shape[1:]
    with on_device(x):
        _linear_kernel[(triton.cdiv(n, rows),)](
            x, weight, scale, bias, norm, squares, out if add else None, out, k, n, EPS=eps, ROWS=rows, PAD=pad,
            P=k // heads, PARTS=parts, SWIGLU=swiglu, num_warps=WARPS, **chain(x, chained),
        )  # fmt: skip


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
    """One row of :func:`mmmamba.ops.linear.linear_step`, whose contract this keeps; the residual must be contiguous.

    With ``squares``, a head's channels and its parts are powers of two.

    Raises:
        ValueError: for more rows, a residual that is not contiguous, or heads of other sizes.
    """
    for size in () if squares is None else (x.shape[1] // squares.shape[1], squares.shape[2]):
        if size & (size - 1):
            raise ValueError(f"linear_step: the kernel's heads have powers of two of channels and parts, not {size}")
    if x.shape[0] != 1:
        raise ValueError(f"linear_step: the kernel takes one row, x has {x.shape[0]}")
    if residual is None:
        out = x.new_empty(1, weight.shape[0] // (2 if swiglu else 1))
    elif residual.is_contiguous():
        out = residual
    else:
        raise ValueError(f"linear_step: the residual must be contiguous, it has strides {residual.stride()}")
    _linear(x, weight, bias, scale, norm, squares, out, eps, residual is not None, swiglu, chained)
    return out
