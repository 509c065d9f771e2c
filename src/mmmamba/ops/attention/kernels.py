"""One token through a softmax layer's heads as two Triton kernels; the twin is ``mmmamba.ops.attention``'s.

Nearly all bytes are the cache's, read once. A sequence's cache is cut into as many splits as fill the GPU, each as long
as its row is at this moment. The grid is of one size, so that a graph serves every length, and nothing after a row's
length is read. A program rotates its queries and keeps an online softmax for all heads of a group; the one whose
split the new token falls into adds its key and value, to the softmax as to the cache. A second launch joins the splits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.ops.attention.shapes import check_shapes
from mmmamba.ops.dispatch import chain, interpreted, on_device, operator
from mmmamba.ops.rotary.angle_kernels import cos_sin

BLOCK, WARPS, STAGES = 64, 4, 2
FULL = 528  # programs that fill a GPU
SPLITS = 128  # at most


@triton.jit
def _rotated(x, head, mask, at_p, cosine, sine, P: tl.constexpr):
    """Heads that begin at ``x + head``, (heads, P), rotated, in float32: ``sine`` has the first half's sign."""
    value = tl.load(x + head[:, None] + at_p[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    partner = tl.load(x + head[:, None] + ((at_p + P // 2) % P)[None, :], mask=mask[:, None], other=0.0)
    return value * cosine[None, :] + partner.to(tl.float32) * sine[None, :]


@triton.jit
def _split_kernel(
    qkv, k, v, slots, positions, frequencies, partial, top, total, qkv_stride, capacity, scale, splits,
    G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAD_R: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Programs (row × group, split): the softmax-weighted values of a split, its maximum and its sum."""
    if CHAINS:
        gdc_launch_dependents()
    row, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    cached = tl.where(slot < 0, 0, position).to(tl.int32)
    length = tl.where(slot < 0, 0, cached + 1)
    each = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, cached)
    member = tl.arange(0, PAD_R)  # of the group's heads
    at_p = tl.arange(0, P)
    angle = tl.load(frequencies + at_p % (P // 2)).to(tl.float32)
    angle *= position.to(tl.float32)
    cosine, sine = cos_sin(angle)
    sine = tl.where(at_p < P // 2, -sine, sine)
    if CHAINS:
        gdc_wait()  # what follows reads what the kernel in front has written
    new = qkv + row.to(tl.int64) * qkv_stride
    query = _rotated(new, (group * R + member) * P, member < R, at_p, cosine, sine, P)
    query = (query * scale).to(DOT)
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
    if (begin <= cached) & (cached < tl.minimum(begin + each, length)):
        one = tl.arange(0, 1)
        key = _rotated(new, (G * R + group) * P + one, one == 0, at_p, cosine, sine, P)
        at = first + cached.to(tl.int64) * (G * P) + one[:, None] * P + at_p[None, :]
        key = key.to(k.dtype.element_ty)  # as later tokens will read it
        value = tl.load(new + (G * R + G + group) * P + one[:, None] + at_p[None, :]).to(v.dtype.element_ty)
        tl.store(k + at, key)
        tl.store(v + at, value)
        score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)
        above = tl.maximum(highest, score)
        shrink = tl.exp2(highest - above)
        share = tl.exp2(score - above)
        weight = weight * shrink + share
        y = y * shrink[:, None] + share[:, None] * value.to(tl.float32)
        highest = above
    here = (row.to(tl.int64) * (G * R) + group * R + member) * splits + split
    tl.store(top + here, highest, mask=member < R)
    tl.store(total + here, weight, mask=member < R)
    tl.store(partial + here[:, None] * P + at_p[None, :], y, mask=(member < R)[:, None])


@triton.jit
def _join_kernel(partial, top, total, out, splits, P: tl.constexpr, PAD: tl.constexpr, CHAINS: tl.constexpr):
    """Programs (row × head): the splits' values, weighed by their maxima; zeros where nothing was seen."""
    if CHAINS:
        gdc_launch_dependents()
        gdc_wait()
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


@operator("attention_step", mutates_args=("k", "v"))
def _attention_step(
    qkv: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, frequencies: Tensor, splits: int, chained: bool
) -> Tensor:
    (_, capacity, g, p), b = k.shape, len(qkv)
    h = qkv.shape[1] // p - 2 * g
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    out = torch.empty(b, h * p, dtype=qkv.dtype, device=qkv.device)
    if not b:
        return out
    partial = qkv.new_empty(b, h, splits, p, dtype=torch.float32)
    top, total = qkv.new_empty(2, b, h, splits, dtype=torch.float32).unbind()
    half = qkv.dtype in (torch.bfloat16, torch.float16)
    # Triton's interpreter cannot multiply bfloat16; float32 holds the operands exactly.
    dot = tl.float32 if interpreted() or not half else tl.bfloat16 if qkv.dtype == torch.bfloat16 else tl.float16
    with on_device(qkv):
        _split_kernel[(b * g, splits)](
            qkv, k, v, slots, positions, frequencies, partial, top, total, qkv.stride(0), capacity,
            math.log2(math.e) / math.sqrt(p), splits, G=g, R=h // g, P=p, PAD_R=max(16, triton.next_power_of_2(h // g)),
            BLOCK=BLOCK, DOT=dot, PRECISION="ieee", num_warps=WARPS, num_stages=STAGES, **chain(qkv, chained),
        )  # fmt: skip
        _join_kernel[(b * h,)](
            partial, top, total, out, splits, P=p, PAD=triton.next_power_of_2(splits), num_warps=4, **chain(qkv, True),
        )  # fmt: skip
    return out


@_attention_step.register_fake
def _(qkv, k, v, slots, positions, frequencies, splits, chained):
    return qkv.new_empty(len(qkv), qkv.shape[1] - 2 * k.shape[2] * k.shape[3])


def attention_step(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    splits: int | None = None,
    chained: bool = False,
) -> Tensor:
    """See :func:`mmmamba.ops.attention_step`, whose contract this keeps; the caches must be contiguous.

    Args:
        splits: parts that a row's cache is cut into (default: as many as fill the GPU).

    Raises:
        ValueError: for shapes that do not fit together, or caches that are not contiguous.
    """
    check_shapes(qkv, k, v, slots, positions, frequencies)
    for name, cache in (("k", k), ("v", v)):
        if not cache.is_contiguous():
            raise ValueError(f"attention_step: {name} must be contiguous, it has strides {cache.stride()}")
    most = -(-k.shape[1] // BLOCK)
    splits = splits or max(1, min(FULL // max(len(qkv) * k.shape[2], 1), most, SPLITS))
    rest = [tensor.contiguous() for tensor in (slots, positions, frequencies)]
    return _attention_step(qkv, k, v, *rest, splits, chained)
