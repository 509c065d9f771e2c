"""The sum over programs of what each found of a weight's gradient, in a fixed order: two runs give the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.ops.dispatch import on_device

SUM_ROWS, SUM_CHANNELS = 512, 8  # tile of the sum over programs: many rows at once, for there are few channels
WARPS = 4


@triton.jit
def _sum_kernel(
    partial, dweight, dbias, programs, C, TAPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(1)
    total = tl.zeros((ROWS, CHANNELS), dtype=WIDE)
    for first in range(0, programs, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < programs)[:, None] & (channel < C)[None, :]
        total += tl.load(partial + (row * TAPS + tap)[:, None] * C + channel[None, :], mask=mask, other=0.0)
    d = tl.sum(total, axis=0)
    if tap < K:
        tl.store(dweight + channel * K + tap, d, mask=channel < C)
    elif dbias is not None:
        tl.store(dbias + channel, d, mask=channel < C)


def sum_partial(partial: Tensor, dweight: Tensor, dbias: Tensor | None = None) -> None:
    """Sum over programs their shares of the gradients to a weight and to a bias, in a fixed order.

    Args:
        partial: (programs, k, c), for weights of k taps a channel; (programs, k + 1, c) with the bias's share last.
        dweight: (c, k), written in its own dtype.
        dbias: (c,), likewise; None without a bias.
    """
    programs, taps, c = partial.shape
    with on_device(partial):
        _sum_kernel[(triton.cdiv(c, SUM_CHANNELS), taps)](
            partial, dweight, dbias, programs, c, TAPS=taps, K=taps if dbias is None else taps - 1, ROWS=SUM_ROWS,
            CHANNELS=SUM_CHANNELS, WIDE=tl.float64 if partial.dtype == torch.float64 else tl.float32, num_warps=WARPS,
        )  # fmt: skip
