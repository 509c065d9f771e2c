"""The causal convolution in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.causal_conv.shapes import check_shapes
from mmmamba.ops.packing import layout_of
from mmmamba.ops.rotary import rotate


def causal_conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "silu",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    rotation: tuple[Tensor, Tensor] | None = None,
    rotate_from: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The convolution in PyTorch's operators. Same contract as :func:`causal_conv`."""
    check_shapes(x, weight, bias, initial_state, cu_seqlens, activation)
    k = weight.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(rows, k - 1, x.shape[2])
    if cu_seqlens is None:
        past = torch.cat([initial_state.to(x.dtype), x], dim=1)  # (b, k-1+l, c)
        y = past[:, k - 1 :] * weight[:, k - 1]
        for j in range(k - 1):
            y = y + past[:, j : j + x.shape[1]] * weight[:, j]
        # A copy: a view would keep the whole row alive for as long as the state lives.
        final = past[:, x.shape[1] :].clone() if return_final_state else None
    else:
        layout = layout_of(cu_seqlens)
        # Rows of the states first, then the tokens; each tap gathers from where its input lies.
        pool = torch.cat([initial_state.to(x.dtype).flatten(0, 1), x[0]])
        base = rows * (k - 1)
        here = torch.arange(layout.total, device=x.device)
        y = x * weight[:, k - 1]
        for back in range(1, k):
            inside = layout.offset >= back
            before = layout.sequence * (k - 1) + (k - 1) + layout.offset - back
            index = torch.where(inside, base + here - back, before)
            y = y + pool.index_select(0, index)[None] * weight[:, k - 1 - back]
        final = None
        if return_final_state:
            # (s, k-1) offset of each input that stays; negative ones lie in the old state.
            slot = layout.sizes[:, None] - (k - 1) + torch.arange(k - 1, device=x.device)
            index = torch.where(
                slot >= 0,
                base + layout.starts[:, None] + slot,
                torch.arange(rows, device=x.device)[:, None] * (k - 1) + (k - 1) + slot,
            )
            final = pool.index_select(0, index.flatten()).view(rows, k - 1, -1)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    if rotation is not None:
        cos, sin = rotation
        heads = y[..., rotate_from:].unflatten(-1, (-1, 2 * cos.shape[-1]))
        y = torch.cat([y[..., :rotate_from], rotate(heads, cos, sin).flatten(-2)], dim=-1)
    return y, final
