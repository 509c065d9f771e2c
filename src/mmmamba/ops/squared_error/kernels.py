"""The weighted squared error as one Triton kernel each way; the twin is ``mmmamba.ops.squared_error_torch``.

Bound by memory: each way reads both inputs once, and nothing of their size is kept between them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator

WARPS = 4


@triton.jit
def _forward_kernel(predicted, target, weight, error, C, PAD: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    at, mask = row * C + column, column < C
    far = tl.load(predicted + at, mask=mask, other=0.0).to(tl.float32)
    far -= tl.load(target + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(error + row, tl.sum(far * far, 0) / C * tl.load(weight + row))


@triton.jit
def _backward_kernel(gradient, predicted, target, weight, out, C, PAD: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    at, mask = row * C + column, column < C
    far = tl.load(predicted + at, mask=mask, other=0.0).to(tl.float32)
    far -= tl.load(target + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, far * (2 / C) * (tl.load(weight + row) * tl.load(gradient)), mask=mask)


@operator("squared_error")
def _forward(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    tokens, channels = predicted.shape
    error = predicted.new_empty(tokens, dtype=torch.float32)
    if error.numel():
        predicted, target, weight = predicted.contiguous(), target.contiguous(), weight.contiguous()
        pad = triton.next_power_of_2(channels)
        with on_device(predicted):
            _forward_kernel[(tokens,)](predicted, target, weight, error, channels, PAD=pad, num_warps=WARPS)
    return error.sum()


@_forward.register_fake
def _(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return predicted.new_empty((), dtype=torch.float32)


@operator("squared_error_backward")
def _backward(gradient: Tensor, predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    tokens, channels = predicted.shape
    out = predicted.new_empty(tokens, channels)
    if out.numel():
        predicted, target, weight = predicted.contiguous(), target.contiguous(), weight.contiguous()
        pad = triton.next_power_of_2(channels)
        with on_device(predicted):
            _backward_kernel[(tokens,)](gradient, predicted, target, weight, out, channels, PAD=pad, num_warps=WARPS)
    return out


@_backward.register_fake
def _(gradient: Tensor, predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return predicted.new_empty(predicted.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _backward(gradient, *ctx.saved_tensors), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def squared_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """See :func:`mmmamba.ops.squared_error`, whose contract this keeps."""
    return _forward(predicted, target.detach(), weight.detach())
