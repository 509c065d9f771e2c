"""One token through a softmax layer's heads: rotation, the new key and value into the cache, attention over it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.rope import rotate
from mmmamba.ops.triton import serves


def check_attend(qkv: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, frequencies: Tensor) -> int:
    """The number of heads; refuse what does not fit together (ValueError naming the tensor)."""
    b = qkv.shape[0]
    pool, capacity, g, p = k.shape
    h = qkv.shape[1] // p - 2 * g
    expected = {
        "qkv": (qkv, (b, (h + 2 * g) * p)),
        "v": (v, (pool, capacity, g, p)),
        "slots": (slots, (b,)),
        "positions": (positions, (b,)),
        "frequencies": (frequencies, (p // 2,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"attend_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if h < 1 or h % g:
        raise ValueError(f"attend_step: {h} heads are not a multiple of {g} groups")
    return h


def attend_step(
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
    """Attention of one new token of each row of a running batch over its slot's cache and itself.

    Args:
        qkv: (b, (h+2g)p) projections q | k | v, in this order, not rotated.
        k, v: (pool, capacity, g, p) caches of rotated keys and of values, to which the token's are added in place;
            group j serves heads j·h/g … (j+1)·h/g-1.
        slots: (b,) int32 or int64, each row's place in the pool, no two the same; a negative one marks a row that only
            fills the batch: it gives zeros and changes nothing.
        positions: (b,) int64, how many tokens each row's cache holds before this one, less than the capacity.
        frequencies: (p/2,) angle by which each pair of channels turns from one position to the next.
        longest: no cache holds more afterwards (default: the capacity). A bound of the host: what lies behind it need
            not be read.
        chained: only qkv may come from the kernel that was launched last; see ``linear_step``.

    Returns:
        the heads (b, h·p) in qkv's dtype.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    if serves(qkv, k, v, slots, positions, frequencies, head_dim=k.shape[-1]):
        from mmmamba.ops.triton.attend import attend_step as kernel

        return kernel(qkv, k, v, slots, positions, frequencies, chained=chained)
    return attend_step_torch(qkv, k, v, slots, positions, frequencies, longest=longest)


def attend_step_torch(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    longest: int | None = None,
) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`attend_step`."""
    h, (g, p) = check_attend(qkv, k, v, slots, positions, frequencies), k.shape[2:]
    width = k.shape[1] if longest is None else longest
    rows = (slots >= 0).nonzero()[:, 0]
    places, at = slots[rows].long(), positions[rows]
    new_q, new_k, new_v = qkv[rows].unflatten(-1, (-1, p)).split([h, g, g], dim=1)
    angles = at.to(frequencies.dtype)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    k[places, at] = rotate(new_k, cos, sin).to(k.dtype)
    v[places, at] = new_v.to(v.dtype)
    seen = torch.arange(width, device=qkv.device) <= at[:, None]
    y = F.scaled_dot_product_attention(
        rotate(new_q, cos, sin)[:, :, None],
        k[places, :width].transpose(1, 2).to(qkv.dtype),
        v[places, :width].transpose(1, 2).to(qkv.dtype),
        attn_mask=seen[:, None, None],
        enable_gqa=h != g,
    )
    out = qkv.new_zeros(len(qkv), h * p)
    return out.index_copy(0, rows, y[:, :, 0].flatten(1))
