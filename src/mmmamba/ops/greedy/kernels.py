"""Greedy picking as two Triton kernels; the twin is ``mmmamba.ops.greedy_tokens_torch``.

The logits are read once: each program finds the best token of some rows in a part of the vocabulary, and the part's sum
of exponentials; a second launch joins the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator

ELEMENTS, WARPS = 2048, 4  # of a tile: along the vocabulary, or along rows that lie side by side
FULL = 528  # programs that fill a GPU


@triton.jit
def _part_kernel(
    logits, banned, best, token, top, total, b, v, row_stride, column_stride, each, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs (rows, part): of the part's tokens the best allowed one, the highest logit and Σ exp beside it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    begin, end = part * each, tl.minimum((part + 1) * each, v)
    # Every lane keeps its own best and its own sum, so that nothing is reduced before the end.
    best_value = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    best_token = tl.zeros([ROWS, COLUMNS], tl.int32) + begin
    highest = tl.full([ROWS, COLUMNS], -3.0e38, tl.float32)  # finite: a part may be all -inf
    weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < b)[:, None] & (column < end)[None, :]
        at = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
        value = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, value)
        weight = weight * tl.exp(highest - above) + tl.exp(value - above)
        highest = above
        if banned is not None:
            out = tl.load(banned + column, mask=column < end, other=1)
            value = tl.where((out != 0)[None, :], float("-inf"), value)
        better = value > best_value
        best_token = tl.where(better, column[None, :], best_token)
        best_value = tl.where(better, value, best_value)
    lane = highest
    highest = tl.max(lane, 1)
    weight = tl.sum(weight * tl.exp(lane - highest[:, None]), 1)
    lane = best_value
    best_value = tl.max(lane, 1)
    best_token = tl.min(tl.where(lane == best_value[:, None], best_token, v), 1)
    here = row * parts + part
    tl.store(best + here, best_value, mask=row < b)
    tl.store(token + here, best_token, mask=row < b)
    tl.store(top + here, highest, mask=row < b)
    tl.store(total + here, weight, mask=row < b)


@triton.jit
def _join_kernel(best, token, top, total, tokens, logprobs, parts, PAD: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PAD)
    at = row * parts + part
    value, index = tl.max(
        tl.load(best + at, mask=part < parts, other=float("-inf")), 0, return_indices=True,
        return_indices_tie_break_left=True,
    )  # fmt: skip
    highest = tl.load(top + at, mask=part < parts, other=-3.0e38)
    above = tl.max(highest, 0)
    weight = tl.sum(tl.load(total + at, mask=part < parts, other=0.0) * tl.exp(highest - above), 0)
    tl.store(tokens + row, tl.load(token + row * parts + index).to(tl.int64))
    tl.store(logprobs + row, value - above - tl.log(weight))


@operator("greedy_tokens")
def _greedy_tokens(logits: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
    b, v = logits.shape
    tokens = torch.empty(b, dtype=torch.long, device=logits.device)
    logprobs = torch.empty(b, dtype=torch.float32, device=logits.device)
    if not b:
        return tokens, logprobs
    side_by_side = logits.stride(0) == 1 and b > 1
    rows = min(64, triton.next_power_of_2(b)) if side_by_side else 1
    columns = min(ELEMENTS // rows, triton.next_power_of_2(v))
    blocks = triton.cdiv(b, rows)
    parts = max(1, min(triton.cdiv(FULL, blocks), triton.cdiv(v, columns)))
    each = triton.cdiv(triton.cdiv(v, parts), columns) * columns
    parts = triton.cdiv(v, each)
    best, top, total = logits.new_empty(3, b, parts, dtype=torch.float32).unbind()
    token = torch.empty(b, parts, dtype=torch.int32, device=logits.device)
    with on_device(logits):
        _part_kernel[(blocks, parts)](
            logits, banned, best, token, top, total, b, v, logits.stride(0), logits.stride(1), each, parts, ROWS=rows,
            COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
        _join_kernel[(b,)](
            best, token, top, total, tokens, logprobs, parts, PAD=triton.next_power_of_2(parts), num_warps=1
        )
    return tokens, logprobs


@_greedy_tokens.register_fake
def _(logits: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
    b = logits.shape[0]
    return logits.new_empty(b, dtype=torch.long), logits.new_empty(b, dtype=torch.float32)


def greedy_tokens(logits: Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`mmmamba.ops.greedy_tokens`, whose contract this keeps.

    Raises:
        ValueError: for logits that are no (b, v) with v of 1 at least, or banned tokens of another number.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"greedy_tokens: logits have shape {tuple(logits.shape)}, expected (b, v)")
    if banned is not None and tuple(banned.shape) != (logits.shape[1],):
        raise ValueError(f"greedy_tokens: banned has shape {tuple(banned.shape)}, expected {(logits.shape[1],)}")
    return _greedy_tokens(logits, banned)
