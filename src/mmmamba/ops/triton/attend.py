"""One token's attention over a cache as Triton kernels; the twin is ``mmmamba.ops.attend.attend_step_torch``.

Nearly all bytes are the cache's, read once. A sequence's cache is cut into as many splits as fill the GPU, each as long
as its row is at this moment: the grid is of one size, so that a graph serves every length, and what lies behind a row's
length is never read. A program keeps an online softmax for all heads of a group; a second launch joins the splits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.attend import check_attend
from mmmamba.ops.triton import interpreted, on_device

BLOCK, WARPS, STAGES = 64, 4, 3
FULL = 528  # programs that fill a GPU
SPLITS = 128  # at most


@triton.jit
def _split_kernel(
    q, k, v, slots, lengths, partial, top, total, q_stride, capacity, scale, splits,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAD_R: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs (row × group, split): the softmax-weighted values of a split, its maximum and its sum."""
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.where(slot < 0, 0, tl.load(lengths + row)).to(tl.int32)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, length)
    member = tl.arange(0, PAD_R)  # of the group's heads
    at_p = tl.arange(0, P)
    at_q = (group * R + member)[:, None] * P + at_p[None, :]
    query = tl.load(q + row.to(tl.int64) * q_stride + at_q, mask=(member < R)[:, None], other=0.0)
    query = (query.to(tl.float32) * scale).to(DOT)
    first = (slot * capacity * G + group) * P
    highest = tl.full([PAD_R], float("-inf"), tl.float32)
    weight = tl.zeros([PAD_R], tl.float32)
    y = tl.zeros([PAD_R, P], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = token < end
        at = first + token.to(tl.int64)[:, None] * (G * P) + at_p[None, :]
        keys = tl.load(k + at, mask=valid[:, None], other=0.0).to(DOT)
        values = tl.load(v + at, mask=valid[:, None], other=0.0).to(DOT)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - above)
        shares = tl.exp2(scores - above[:, None])
        weight = weight * shrink + tl.sum(shares, 1)
        y = tl.dot(shares.to(DOT), values, y * shrink[:, None], input_precision=PRECISION)
        highest = above
    here = (row.to(tl.int64) * (G * R) + group * R + member) * splits + split
    tl.store(top + here, highest, mask=member < R)
    tl.store(total + here, weight, mask=member < R)
    tl.store(partial + here[:, None] * P + at_p[None, :], y, mask=(member < R)[:, None])


@triton.jit
def _join_kernel(partial, top, total, out, splits, P: tl.constexpr, PAD: tl.constexpr):
    """Programs (row × head): the splits' values, weighed by their maxima; zeros where nothing was seen."""
    here = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PAD)
    real = split < splits
    at_p = tl.arange(0, P)
    highest = tl.load(top + here * splits + split, mask=real, other=float("-inf"))
    above = tl.maximum(tl.max(highest, 0), -3.0e38)  # finite also where no split has seen a token
    share = tl.exp2(highest - above)
    weight = tl.sum(share * tl.load(total + here * splits + split, mask=real, other=0.0), 0)
    at = (here * splits + split)[:, None] * P + at_p[None, :]
    y = tl.sum(tl.load(partial + at, mask=real[:, None], other=0.0) * share[:, None], 0)
    tl.store(out + here * P + at_p, y / tl.where(weight == 0.0, 1.0, weight))


@torch.library.custom_op("mmmamba::attend_step", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, splits: int) -> Tensor:
    b, h, p = q.shape
    _, capacity, g, _ = k.shape
    q = q if q.stride(1) == p and q.stride(2) == 1 else q.contiguous()
    out = torch.empty(b, h, p, dtype=q.dtype, device=q.device)
    if not b:
        return out
    partial = q.new_empty(b, h, splits, p, dtype=torch.float32)
    top, total = q.new_empty(2, b, h, splits, dtype=torch.float32).unbind()
    half = q.dtype in (torch.bfloat16, torch.float16)
    # Triton's interpreter cannot multiply bfloat16; float32 holds the operands exactly.
    dot = tl.float32 if interpreted() or not half else tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16
    with on_device(q):
        _split_kernel[(b * g, splits)](
            q, k, v, slots, lengths, partial, top, total, q.stride(0), capacity, math.log2(math.e) / math.sqrt(p),
            splits, G=g, R=h // g, P=p, PAD_R=max(16, triton.next_power_of_2(h // g)), BLOCK=BLOCK, DOT=dot,
            PRECISION="ieee", num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        _join_kernel[(b * h,)](partial, top, total, out, splits, P=p, PAD=triton.next_power_of_2(splits), num_warps=4)
    return out


@_attend.register_fake
def _(q, k, v, slots, lengths, splits):
    return q.new_empty(q.shape)


def attend_step(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, *, splits: int | None = None
) -> Tensor:
    """See :func:`mmmamba.ops.attend.attend_step`, whose contract this keeps; the caches must be contiguous.

    Args:
        splits: parts that a row's cache is cut into (default: as many as fill the GPU).

    Raises:
        ValueError: for shapes that do not fit together, or caches that are not contiguous.
    """
    check_attend(q, k, v, slots, lengths)
    for name, cache in (("k", k), ("v", v)):
        if not cache.is_contiguous():
            raise ValueError(f"attend_step: {name} must be contiguous, it has strides {cache.stride()}")
    most = -(-k.shape[1] // BLOCK)
    splits = splits or max(1, min(FULL // max(len(q) * k.shape[2], 1), most, SPLITS))
    return _attend(q, k, v, slots.contiguous(), lengths.contiguous(), splits)
