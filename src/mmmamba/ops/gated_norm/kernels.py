"""RMSNorm of each head times a SiLU gate as one Triton kernel each way; the twin is ``mmmamba.ops.gated_norm``.

Both ways are bound by memory: a program takes tiles of whole heads, so every input is read once and every output
written once. The backward pass works the statistics out again, which is cheaper than to store them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator
from mmmamba.ops.sum_kernels import sum_partial

TILE, BACKWARD_TILE = 4096, 1024  # elements of a tile: backward few, for many programs at once hide the memory's delay
PROGRAMS = 768  # of a backward launch, at most: an H100 holds them all at once, each with one row of partial sums
WARPS = 4


@triton.jit
def _forward_kernel(
    x, gate, weight, out, rows, EPS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PAD)
    mask = (row < rows)[:, None] & (column < P)[None, :]
    at = row[:, None] * P + column[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(WIDE)
    gates = tl.load(gate + at, mask=mask, other=0.0).to(WIDE)
    scale = tl.load(weight + column, mask=column < P, other=0.0).to(WIDE)
    inverse = 1 / tl.sqrt(tl.sum(value * value, axis=1) / P + EPS)
    result = value * inverse[:, None] * scale[None, :] * gates * tl.sigmoid(gates)
    tl.store(out + at, result, mask=mask)


@triton.jit
def _backward_kernel(
    dout, x, gate, weight, dx, dgate, partial, rows, tiles, EPS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    PAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, PAD)
    scale = tl.load(weight + column, mask=column < P, other=0.0).to(WIDE)
    dweight = tl.zeros((ROWS, PAD), dtype=WIDE)
    for tile in range(tiles):
        row = (program.to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < P)[None, :]
        at = row[:, None] * P + column[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(WIDE)
        gates = tl.load(gate + at, mask=mask, other=0.0).to(WIDE)
        d = tl.load(dout + at, mask=mask, other=0.0).to(WIDE)
        inverse = 1 / tl.sqrt(tl.sum(value * value, axis=1) / P + EPS)
        normed = value * inverse[:, None]
        sigmoid = tl.sigmoid(gates)
        silu = gates * sigmoid
        dweight += d * normed * silu
        d *= scale[None, :]
        slope = sigmoid * (1 + gates * (1 - sigmoid))
        tl.store(dgate + at, d * normed * slope, mask=mask)
        dnormed = d * silu
        along = tl.sum(dnormed * normed, axis=1) / P
        tl.store(dx + at, inverse[:, None] * (dnormed - normed * along[:, None]), mask=mask)
    tl.store(partial + program * P + column, tl.sum(dweight, axis=0), mask=column < P)


def _tile(x: Tensor, elements: int) -> dict[str, Any]:
    """The compile-time sizes for heads (…, p) in tiles of so many elements."""
    p = x.shape[-1]
    pad = triton.next_power_of_2(p)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"P": p, "PAD": pad, "ROWS": max(elements // pad, 1), "WIDE": wide, "num_warps": WARPS}


@operator("gated_norm")
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, gate.dtype))
    tile = _tile(x, TILE)
    rows = x.numel() // x.shape[-1]
    if rows:
        with on_device(x):
            _forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, gate, weight, out, rows, EPS=eps, **tile)
    return out


@_forward.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gate.dtype))


@operator("gated_norm_backward")
def _backward(dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dout, x, gate, weight = dout.contiguous(), x.contiguous(), gate.contiguous(), weight.contiguous()
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    dweight = torch.empty_like(weight)
    tile = _tile(x, BACKWARD_TILE)
    rows = x.numel() // x.shape[-1]
    tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
    programs = triton.cdiv(rows, tile["ROWS"] * max(tiles, 1))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty(programs, 1, x.shape[-1], dtype=wide)
    if programs:
        with on_device(x):
            _backward_kernel[(programs,)](dout, x, gate, weight, dx, dgate, partial, rows, tiles, EPS=eps, **tile)
    sum_partial(partial, dweight)
    return dx, dgate, dweight


@_backward.register_fake
def _(dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) · weight · SiLU(gate), norm first; the statistics and products in float32.

    Args:
        x, gate: (…, p).  weight: (p,).  eps: added to the mean square.

    Returns:
        (…, p) in the wider dtype of x and gate, with gradients to x, gate and weight; two runs give the same bits.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if gate.shape != x.shape or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"gated_norm: x {tuple(x.shape)}, gate {tuple(gate.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    return _forward(x, gate, weight, eps)
