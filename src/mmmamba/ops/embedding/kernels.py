"""The beginning of a decoding step as one Triton kernel; the twin is ``mmmamba.ops.embed_step_torch``.

A program for each row: it copies the row's embedding, and counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device, operator


@triton.jit
def _embed_kernel(
    tokens, slots, weight, special, counts, x, at, V, D, B, POOL, C: tl.constexpr, PAD_C: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    slot = tl.load(slots + row)
    column = tl.arange(0, PAD)
    source = weight + token * D
    if special is not None:
        source = tl.where(token < V, source, special + (token - V) * D)
    tl.store(x + row * D + column, tl.load(source + column, mask=column < D), mask=column < D)
    counter = tl.arange(0, PAD_C)
    place = counts + counter.to(tl.int64) * POOL + slot
    mask = (counter < C) & (counter + slot >= counter)  # none of a negative slot
    seen = tl.load(place, mask=mask, other=0)
    tl.debug_barrier()  # several threads may hold one counter: none moves it on before all have read
    tl.store(place, seen + 1, mask=mask)
    tl.store(at + counter * B + row, seen, mask=counter < C)


@operator("embed_step", mutates_args=("counts",))
def _embed_step(
    tokens: Tensor, slots: Tensor, weight: Tensor, special: Tensor | None, counts: Tensor
) -> tuple[Tensor, Tensor]:
    b, (c, pool) = len(tokens), counts.shape
    x, at = weight.new_empty(b, weight.shape[1]), counts.new_empty(c, b)
    if b:
        with on_device(tokens):
            _embed_kernel[(b,)](
                tokens, slots, weight, special, counts, x, at, *weight.shape, b, pool, C=c,
                PAD_C=triton.next_power_of_2(c), PAD=triton.next_power_of_2(weight.shape[1]), num_warps=4,
            )  # fmt: skip
    return x, at


@_embed_step.register_fake
def _(tokens: Tensor, slots: Tensor, weight: Tensor, special: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(len(tokens), weight.shape[1]), counts.new_empty(len(counts), len(tokens))


def embed_step(
    tokens: Tensor, slots: Tensor, weight: Tensor, counts: Tensor, *, special: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`mmmamba.ops.embed_step`, whose contract this keeps.

    Raises:
        ValueError: for counts that are not contiguous.
    """
    if not counts.is_contiguous():
        raise ValueError(f"embed_step: counts must be contiguous, they have strides {counts.stride()}")
    weight = weight.contiguous()
    special = None if special is None else special.contiguous()
    return _embed_step(tokens.contiguous(), slots.contiguous(), weight, special, counts)
