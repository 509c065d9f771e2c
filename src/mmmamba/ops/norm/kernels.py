"""Norms over the last dimension as one Triton kernel each way; the twins are ``rms_norm`` and ``unit_norm`` of
``mmmamba.ops.norm``.

    y = w x / sqrt(mean(x^2) + eps)          RMSNorm
    y = x / max(|x|, eps)                    unit length (UNIT)

Both ways are bound by memory. The result is written in the dtype that its reader wants, so that no second pass casts
it; the backward pass works the statistics out again, which is cheaper than to store them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator
from mmmamba.ops.sum_kernels import sum_partial

TILE, BACKWARD_TILE = 4096, 2048  # elements of a tile
PROGRAMS = 768  # of a backward launch that sums a weight's gradient: each leaves one row of partial sums
WARPS = 4
UNIT_LENGTH = 1e-12  # that is divided by at least


@triton.jit
def _inverse(value, P: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr):
    """What each row is multiplied by, before the weight."""
    total = tl.sum(value * value, axis=1)
    if UNIT:
        inverse = 1 / tl.maximum(tl.sqrt(total), EPS)
    else:
        inverse = 1 / tl.sqrt(total / P + EPS)
    return inverse


@triton.jit
def _forward_kernel(
    x, outer, inner, weight, out, rows, heads, EPS: tl.constexpr, UNIT: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PAD)
    mask = (row < rows)[:, None] & (column < P)[None, :]
    from_ = (row // heads * outer + row % heads * inner)[:, None] + column[None, :]
    value = tl.load(x + from_, mask=mask, other=0.0).to(WIDE)
    result = value * _inverse(value, P, EPS, UNIT)[:, None]
    if weight is not None:
        result *= tl.load(weight + column, mask=column < P, other=0.0).to(WIDE)[None, :]
    tl.store(out + row[:, None] * P + column[None, :], result, mask=mask)


@triton.jit
def _backward_kernel(
    dout, x, outer, inner, weight, dx, partial, rows, heads, tiles, EPS: tl.constexpr, UNIT: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, PAD)
    if weight is not None:
        scale = tl.load(weight + column, mask=column < P, other=0.0).to(WIDE)
    if partial is not None:
        dweight = tl.zeros((ROWS, PAD), dtype=WIDE)
    for tile in range(tiles):
        row = (program.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < P)[None, :]
        from_ = (row // heads * outer + row % heads * inner)[:, None] + column[None, :]
        value = tl.load(x + from_, mask=mask, other=0.0).to(WIDE)
        d = tl.load(dout + row[:, None] * P + column[None, :], mask=mask, other=0.0).to(WIDE)
        inverse = _inverse(value, P, EPS, UNIT)[:, None]
        normed = value * inverse
        if partial is not None:
            dweight += d * normed
        if weight is not None:
            d *= scale[None, :]
        along = tl.sum(d * normed, axis=1)[:, None]
        if UNIT:
            along = tl.where(inverse * EPS < 1, along, 0.0)  # a row that is too short is only divided by a number
        else:
            along = along / P
        tl.store(dx + row[:, None] * P + column[None, :], inverse * (d - normed * along), mask=mask)
    if partial is not None:
        tl.store(partial + program * P + column, tl.sum(dweight, axis=0), mask=column < P)


def _spaced(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x (…, heads, p) as rows that a kernel can walk: the tensor, its strides over all in front and over heads, heads.

    A slice of a wider projection stays where it is; what no two strides describe is copied.
    """
    heads = x.shape[-2] if x.ndim > 1 else 1
    rows = x.reshape(-1, heads, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0), rows.stride(1), heads


def _tile(x: Tensor, elements: int, eps: float, unit: bool) -> dict[str, Any]:
    """The compile-time sizes for rows (…, p) in tiles of so many elements."""
    p = x.shape[-1]
    pad = triton.next_power_of_2(p)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    rows = max(elements // pad, 1)
    warps = WARPS if pad <= 4 * TILE else 2 * WARPS
    return {"EPS": eps, "UNIT": unit, "P": p, "PAD": pad, "ROWS": rows, "WIDE": wide, "num_warps": warps}


@operator("row_norm")
def _forward(x: Tensor, weight: Tensor | None, eps: float, unit: bool, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    if rows:
        spaced, outer, inner, heads = _spaced(x)
        tile = _tile(x, TILE, eps, unit)
        weight = None if weight is None else weight.contiguous()
        with on_device(x):
            _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](spaced, outer, inner, weight, out, rows, heads, **tile)
    return out


@_forward.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, unit: bool, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@operator("row_norm_backward")
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, eps: float, unit: bool, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and that of the weight if it is wanted (else empty)."""
    dout = dout.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(x, BACKWARD_TILE, eps, unit)
    rows = x.numel() // x.shape[-1]
    blocks = triton.cdiv(rows, tile["ROWS"])
    tiles = triton.cdiv(blocks, PROGRAMS) if wanted else 1
    programs = triton.cdiv(blocks, max(tiles, 1))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(programs, 1, x.shape[-1], dtype=wide) if wanted else None
    if programs:
        spaced, outer, inner, heads = _spaced(x)
        weight = None if weight is None else weight.contiguous()
        with on_device(x):
            _backward_kernel[(programs,)](dout, spaced, outer, inner, weight, dx, partial, rows, heads, tiles, **tile)
    if weight is None or partial is None:
        return dx, x.new_empty(0)
    dweight = torch.empty_like(weight)
    sum_partial(partial, dweight)
    return dx, dweight


@_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor | None, eps: float, unit: bool, wanted: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None or not wanted else weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps, ctx.unit, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[1]
    dx, dweight = _backward(dout, *ctx.saved_tensors, ctx.eps, ctx.unit, wanted)
    return dx, dweight if wanted else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x (…, p) / rms(x) · weight (p,), in ``dtype``; see :func:`mmmamba.ops.rms_norm`.

    Raises:
        ValueError: for a weight of another size.
    """
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected {(x.shape[-1],)}")
    return _forward(x, weight, eps, False, dtype)


def unit_norm(x: Tensor) -> Tensor:
    """x (…, p) at unit length, in its own dtype; see :func:`mmmamba.ops.unit_norm`."""
    return _forward(x, None, UNIT_LENGTH, True, x.dtype)
