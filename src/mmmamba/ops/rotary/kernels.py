"""The rotation of heads as one Triton kernel, both ways; the twin is ``mmmamba.ops.rotate_torch``.

A program turns all heads of some tokens, so that their angles are read once. The gradient is turned back by the same
kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator

TILE, WARPS = 1024, 4  # pairs of channels of a tile


@triton.jit
def _rotate_kernel(
    x, token_stride, head_stride, cos, sin, out, tokens, heads, BACK: tl.constexpr, HALF: tl.constexpr,
    PAD: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAD)
    mask = (token < tokens)[:, None] & (pair < HALF)[None, :]
    angle = token[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0).to(WIDE)
    s = tl.load(sin + angle, mask=mask, other=0.0).to(WIDE)
    if BACK:
        s = -s
    for head in range(heads):
        from_ = token[:, None] * token_stride + head * head_stride + pair[None, :]
        to = (token[:, None] * heads + head) * (2 * HALF) + pair[None, :]
        first = tl.load(x + from_, mask=mask, other=0.0).to(WIDE)
        second = tl.load(x + from_ + HALF, mask=mask, other=0.0).to(WIDE)
        tl.store(out + to, first * c - second * s, mask=mask)
        tl.store(out + to + HALF, second * c + first * s, mask=mask)


@operator("rotate")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    heads, p = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens = x.numel() // max(heads * p, 1)
    if not tokens:
        return out
    even = x.ndim == 3 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    x = x if even and x.ndim in (3, 4) and x.stride(-1) == 1 else x.contiguous()
    pad = triton.next_power_of_2(p // 2)
    block = max(TILE // pad, 1)
    with on_device(x):
        _rotate_kernel[(triton.cdiv(tokens, block),)](
            x, x.stride(-3), x.stride(-2), cos.contiguous(), sin.contiguous(), out, tokens, heads, BACK=back,
            HALF=p // 2, PAD=pad, TOKENS=block, WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            num_warps=WARPS,
        )  # fmt: skip
    return out


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate(dout, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_autograd, setup_context=_setup_context)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, heads, p) turned by angles of each token, (…, 1, p/2); the products in float32.

    Angles get no gradient.

    Raises:
        ValueError: when there is not one angle for each token and pair of channels.
    """
    p = x.shape[-1]
    expected = x.numel() // x.shape[-2] // 2 if x.numel() else 0
    if p % 2 or cos.numel() != expected or sin.numel() != expected:
        raise ValueError(f"rotate: angles of shape {tuple(cos.shape)} do not fit x {tuple(x.shape)}")
    return _rotate(x, cos, sin, False)
