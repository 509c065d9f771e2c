"""One token through a softmax layer's heads: rotation, the new key and value into the cache, attention over it."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.attention.reference import attention_step_torch
from mmmamba.ops.dispatch import serves

__all__ = ["attention_step", "attention_step_torch"]


def attention_step(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    longest: int | None = None,
    chained: bool = False,
) -> Tensor:
    """Attend from one new token of each row of a running batch to its slot's cache and itself.

    Args:
        qkv: (b, (h+2g)p) projections q | k | v, in this order, not rotated.
        k, v: (pool, capacity, g, p) caches of rotated keys and of values, to which the token's are added in place;
            group j serves heads j·h/g … (j+1)·h/g-1.
        slots: (b,) int32 or int64, each row's place in the pool, no two the same; a negative one marks a row that only
            fills the batch: it gives zeros and changes nothing.
        positions: (b,) int64, how many tokens each row's cache holds before this one, less than the capacity.
        frequencies: (p/2,) angle by which each pair of channels turns from one position to the next.
        longest: no cache holds more tokens afterwards (default: the capacity). The host knows this bound, and the
            twin does not read beyond it.
        chained: only qkv may come from the kernel that was launched last; see ``linear_step``.

    Returns:
        the heads (b, h·p) in qkv's dtype.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    if serves(qkv, k, v, slots, positions, frequencies, head_dim=k.shape[-1]):
        from mmmamba.ops.attention.kernels import attention_step as kernel

        return kernel(qkv, k, v, slots, positions, frequencies, chained=chained)
    return attention_step_torch(qkv, k, v, slots, positions, frequencies, longest=longest)
