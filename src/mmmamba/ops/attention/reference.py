"""One step of attention over a cache in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.attention.shapes import check_shapes
from mmmamba.ops.rotary import rotate


def attention_step_torch(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    longest: int | None = None,
) -> Tensor:
    """The same in PyTorch's operators. Same contract as :func:`attention_step`."""
    h, (g, p) = check_shapes(qkv, k, v, slots, positions, frequencies), k.shape[2:]
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
