"""SiLU(gate) · up as one Triton kernel each way; the twin is ``mmmamba.ops.swiglu_torch``.

Every input is read once and every output written once; nothing but the inputs is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator

BLOCK, WARPS = 2048, 4  # elements of a program


@triton.jit
def _places(gate_stride, up_stride, N, BLOCK: tl.constexpr):
    """Where a program's elements lie in gate, in up and in a contiguous tensor, and which of them there are."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row * gate_stride + column, row * up_stride + column, row * N + column, column < N


@triton.jit
def _forward_kernel(gate, up, out, gate_stride, up_stride, N, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at_gate, at_up, at, mask = _places(gate_stride, up_stride, N, BLOCK)
    g = tl.load(gate + at_gate, mask=mask, other=0.0).to(WIDE)
    u = tl.load(up + at_up, mask=mask, other=0.0).to(WIDE)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=mask)


@triton.jit
def _backward_kernel(dout, gate, up, dgate, dup, gate_stride, up_stride, N, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at_gate, at_up, at, mask = _places(gate_stride, up_stride, N, BLOCK)
    d = tl.load(dout + at, mask=mask, other=0.0).to(WIDE)
    g = tl.load(gate + at_gate, mask=mask, other=0.0).to(WIDE)
    u = tl.load(up + at_up, mask=mask, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(g)
    tl.store(dup + at, d * g * sigmoid, mask=mask)
    tl.store(dgate + at, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=mask)


def _flat(x: Tensor) -> Tensor:
    """(…, n) as rows (m, n) whose elements lie side by side; a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@operator("swiglu")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    g, u, n = _flat(gate), _flat(up), gate.shape[-1]
    if g.numel():
        with on_device(gate):
            _forward_kernel[(len(g), triton.cdiv(n, BLOCK))](
                g, u, out, g.stride(0), u.stride(0), n, BLOCK=BLOCK, WIDE=_wide(gate), num_warps=WARPS
            )
    return out


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@operator("swiglu_backward")
def _backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = (gate.new_empty(gate.shape) for _ in range(2))
    d, g, u, n = dout.contiguous(), _flat(gate), _flat(up), gate.shape[-1]
    if g.numel():
        with on_device(gate):
            _backward_kernel[(len(g), triton.cdiv(n, BLOCK))](
                d, g, u, dgate, dup, g.stride(0), u.stride(0), n, BLOCK=BLOCK, WIDE=_wide(gate), num_warps=WARPS
            )
    return dgate, dup


@_backward.register_fake
def _(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dout, *ctx.saved_tensors)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`mmmamba.ops.swiglu`, whose contract this keeps; with gradients to both.

    Raises:
        ValueError: when gate and up differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
    return _forward(gate, up)
