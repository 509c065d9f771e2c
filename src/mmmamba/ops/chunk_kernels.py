"""What the kernels of the chunked recurrences share: where chunks lie, and how their products are multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import interpreted

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(table, chunk, length, CHUNK: tl.constexpr):
    """Of a chunk's sequence: its row, its first and its last chunk, its first token, and the token after its last."""
    if table is None:
        row = chunk // tl.maximum(tl.cdiv(length, CHUNK), 1)
        first = row * tl.maximum(tl.cdiv(length, CHUNK), 1)
        start = row.to(tl.int64) * length
        tokens = length
    else:
        row = tl.load(table + chunk * 4)
        first = tl.load(table + chunk * 4 + 1)
        start = tl.load(table + chunk * 4 + 2).to(tl.int64)
        tokens = tl.load(table + chunk * 4 + 3)
        first = tl.where(tokens == 0, chunk, first)  # what pads a table counts as empty sequences
    return row, first, first + tl.maximum(tl.cdiv(tokens, CHUNK), 1) - 1, start, start + tokens


@triton.jit
def load_rows(tensor, token, stride, inside, at, valid):
    """The (q, width) inputs of a chunk's tokens, zeros after its end."""
    return tl.load(tensor + token * stride + (inside[:, None] * stride + at[None, :]), mask=valid[:, None], other=0.0)


def even_rows(t: Tensor) -> Tensor:
    """``t`` (b, l, …) such that its tokens are evenly spaced over batch and length and its last dimension is dense."""
    even = t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    return t if even and t.stride(-1) == 1 else t.contiguous()


def dot_types(x: Tensor, B: Tensor, C: Tensor) -> tuple[tl.dtype, str, torch.dtype]:
    """The products' operand type and precision for these inputs, and the type in which chunk states are stored."""
    dtypes = {x.dtype, B.dtype, C.dtype}
    if dtypes == {torch.bfloat16}:
        # Triton's interpreter cannot multiply bfloat16; float32 holds the operands exactly.
        return tl.float32 if interpreted() else tl.bfloat16, "ieee", torch.bfloat16
    return tl.float32, "tf32x3" if torch.float32 in dtypes else "tf32", torch.float32


def ceil_div(size: int, part: int) -> int:
    """How many parts of at most ``part`` make up ``size``."""
    return -(-size // part)
