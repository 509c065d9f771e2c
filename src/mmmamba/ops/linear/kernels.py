"""The linear map of one token, or a few, as one Triton kernel; the twin is ``mmmamba.ops.linear_step_torch``.

The matrix is read once, at the rate of the memory. A program holds some whole rows of it: all its loads are in flight
before the first is used, and no loop waits. In a chain of launches (programmatic dependent launch) they are in flight
before the kernel before this one has ended. When it has ended, the first programs ask for the rows of those that will
take their places. Every program reads the tokens x from the caches and computes their norm again, so the tokens must be
few.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.ops.dispatch import chain, on_device, operator
from mmmamba.ops.linear.tuning import INT8_TOKENS

WARPS = 4
RESIDENT = 4  # programs of a multiprocessor that begin together, about
SPAN = 8  # columns side by side in a thread, of int8 as of bfloat16: x need not move between threads to meet either


@triton.jit
def _rows(weight, row, mask, column, K):
    """Whole rows of a matrix, (r, PAD)."""
    at = row.to(tl.int64)[:, None] * K + column[None, :]
    return tl.load(weight + at, mask=mask[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def _scalars(at, row, mask, default: tl.constexpr):
    """A float32 for each of some rows (r,): from a vector, or the same for all."""
    if at is None:
        return tl.full(row.shape, default, tl.float32)
    else:
        return tl.load(at + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inverse(squares, K, P: tl.constexpr, PARTS: tl.constexpr, PAD: tl.constexpr, EPS: tl.constexpr):
    """What each of a token's channels (PAD,) is multiplied by, from the sums of squares of heads of P."""
    head = tl.arange(0, PAD // P)
    at = head[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    square = tl.sum(tl.load(squares + at, mask=(head < K // P)[:, None], other=0.0).to(tl.float32), 1)
    inverse = 1 / tl.sqrt(square / P + EPS)
    return tl.reshape(tl.broadcast_to(inverse[:, None], (PAD // P, P)), (PAD,))


@triton.jit
def _expect(weight, row, K, N, ROWS: tl.constexpr):
    """Have whole rows from ``row`` on brought to the L2 cache, as far as there are any; nothing waits for them."""
    size = tl.maximum(tl.minimum(N - row, ROWS), 0) * K * (weight.dtype.element_ty.primitive_bitwidth // 8)
    at = weight + row.to(tl.int64) * K
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 p, thread, 0;
        setp.gt.and.s32 p, $2, 0, p;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [at.to(tl.int64), size.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _linear_kernel(
    x, weight, scale, bias, norm, squares, residual, out, K, N, EPS: tl.constexpr, TOKENS: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr,
    SWIGLU: tl.constexpr, AHEAD: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    if CHAINS:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < N
    column = tl.max_contiguous(tl.arange(0, PAD), SPAN)
    w = _rows(weight, row, mask, column, K)
    factor = _scalars(scale, row, mask, 1.0)
    shift = _scalars(bias, row, mask, 0.0)
    if SWIGLU:
        w_up = _rows(weight + N.to(tl.int64) * K, row, mask, column, K)
        factor_up = _scalars(None if scale is None else scale + N, row, mask, 1.0)
        shift_up = _scalars(None if bias is None else bias + N, row, mask, 0.0)
    if norm is not None:
        shape = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    if CHAINS:
        gdc_wait()  # what follows reads what the kernel in front has written
        # Programs that began together wait together: while they work, the memory is to bring what comes after them.
        next_row = (tl.program_id(0) + AHEAD) * ROWS
        if tl.program_id(0) < AHEAD:
            _expect(weight, next_row, K, N, ROWS)
            if SWIGLU:
                _expect(weight + N.to(tl.int64) * K, next_row, K, N, ROWS)
    following = tl.load(x + column, mask=column < K, other=0.0)
    for token in tl.static_range(TOKENS):
        value = following.to(tl.float32)
        if token + 1 < TOKENS:
            following = tl.load(x + (token + 1) * K + column, mask=column < K, other=0.0)
        if residual is not None:
            before = tl.load(residual + token * N + row, mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0
        if squares is not None:
            value *= _inverse(squares + token * (K // P * PARTS), K, P, PARTS, PAD, EPS)
        if norm is not None:  # a row's products are linear in its norm: they need not wait for it
            inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / K + EPS)
            value *= shape
        y = tl.sum(w.to(tl.float32) * value[None, :], 1) * inverse * factor + shift
        if SWIGLU:
            up = tl.sum(w_up.to(tl.float32) * value[None, :], 1) * inverse * factor_up + shift_up
            y = y * tl.sigmoid(y) * up
        if residual is not None:
            y += before
        tl.store(out + token * N + row, y, mask=mask)


def _bytes(weight: Tensor, tokens: int) -> int:
    """Of the matrix, a program: eight loads of 16 bytes a thread, or sixteen where the registers are free for them."""
    return 32768 if tokens == 1 and weight.dtype != torch.int8 else 16384


@functools.cache
def _resident(device: torch.device) -> int:
    return RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count


def _in_sixteens(weight: Tensor) -> bool:
    """Whether each row begins and ends where a prefetch may: at a multiple of 16 bytes."""
    return weight.data_ptr() % 16 == 0 and weight.shape[1] * weight.element_size() % 16 == 0


@operator("linear_step", mutates_args=("out",))
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
    (b, k), n = x.shape, weight.shape[0] // (2 if swiglu else 1)
    # Two products a thread at least: a single one could be fused with the sum of the rest, in each thread its own way.
    pad = max(2 * 32 * WARPS, triton.next_power_of_2(k))
    rows = max(1, _bytes(weight, b) // weight.element_size() // (2 if swiglu else 1) // pad)
    x, weight = x.contiguous(), weight.contiguous()
    scale, bias, norm, squares = (None if t is None else t.contiguous() for t in (scale, bias, norm, squares))
    heads, parts = (1, 1) if squares is None else squares.shape[1:]
    chains = chain(x, chained)
    ahead = _resident(x.device) if chains["CHAINS"] and _in_sixteens(weight) else 0
    with on_device(x):
        _linear_kernel[(triton.cdiv(n, rows),)](
            x, weight, scale, bias, norm, squares, out if add else None, out, k, n, EPS=eps, TOKENS=b, SPAN=SPAN,
            ROWS=rows, PAD=pad, P=k // heads, PARTS=parts, SWIGLU=swiglu, AHEAD=ahead, num_warps=WARPS, **chains,
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
    """Few tokens of :func:`mmmamba.ops.linear_step`, whose contract this keeps; a contiguous residual.

    With ``squares``, a head's channels and its parts are powers of two. Each number of tokens is compiled apart.

    Raises:
        ValueError: for no token or too many, a residual that is not contiguous, or heads of other sizes.
    """
    for size in () if squares is None else (x.shape[1] // squares.shape[1], squares.shape[2]):
        if size & (size - 1):
            raise ValueError(f"linear_step: the kernel's heads have powers of two of channels and parts, not {size}")
    if not 1 <= len(x) <= INT8_TOKENS:
        raise ValueError(f"linear_step: the kernel takes 1 to {INT8_TOKENS} tokens, x has {len(x)}")
    if residual is None:
        out = x.new_empty(len(x), weight.shape[0] // (2 if swiglu else 1))
    elif residual.is_contiguous():
        out = residual
    else:
        raise ValueError(f"linear_step: the residual must be contiguous, it has strides {residual.stride()}")
    _linear(x, weight, bias, scale, norm, squares, out, eps, residual is not None, swiglu, chained)
    return out
