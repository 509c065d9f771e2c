"""One token's softmax attention over what its sequence has cached: the decoding step of a softmax layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.triton import serves


def check_attend(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    b, h, p = q.shape
    pool, capacity, g, _ = k.shape
    expected = {
        "k": (k, (pool, capacity, g, p)),
        "v": (v, (pool, capacity, g, p)),
        "slots": (slots, (b,)),
        "lengths": (lengths, (b,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"attend_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if h % g:
        raise ValueError(f"attend_step: {h} heads are not a multiple of {g} groups")


def attend_step(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, *, longest: int | None = None
) -> Tensor:
    """Attention of one query for each row of a running batch over its slot's cache.

    Args:
        q: (b, h, p) queries, rotated.
        k, v: (pool, capacity, g, p) caches; group j serves heads j·h/g … (j+1)·h/g-1.
        slots: (b,) int32 or int64, each row's place in the pool; a negative one marks a row that only fills the batch,
            and gives zeros.
        lengths: (b,) int64, how many tokens of its cache each row sees, at least 1.
        longest: no row sees more (default: the capacity). A bound of the host: what lies behind it need not be read.

    Returns:
        (b, h, p) in q's dtype.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    check_attend(q, k, v, slots, lengths)
    if serves(q, k, v, slots, lengths, head_dim=q.shape[2]):
        from mmmamba.ops.triton.attend import attend_step as kernel

        return kernel(q, k, v, slots, lengths)
    return attend_step_torch(q, k, v, slots, lengths, longest=longest)


def attend_step_torch(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, *, longest: int | None = None
) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`attend_step`."""
    width = k.shape[1] if longest is None else longest
    places = slots.long().clamp(min=0)
    seen = torch.arange(width, device=q.device) < lengths[:, None]
    y = F.scaled_dot_product_attention(
        q[:, :, None],
        k[places, :width].transpose(1, 2),
        v[places, :width].transpose(1, 2),
        attn_mask=seen[:, None, None],
        enable_gqa=q.shape[1] != k.shape[2],
    )
    return torch.where((slots < 0)[:, None, None], 0.0, y[:, :, 0])
