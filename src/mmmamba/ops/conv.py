"""Depthwise causal convolution over time, with state and packed rows, and the rotation that may follow it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.ops.layout import layout_of
from mmmamba.ops.rope import rotate
from mmmamba.ops.triton import serves


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(y)
    if activation == "none":
        return y
    raise ValueError(f"conv activation must be 'silu' or 'none', got {activation!r}")


def causal_conv(
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
    """y_t = rotate(activation(bias + sum_j weight[:, j] · x_{t-(k-1)+j})): ``weight[:, k-1]`` is the current token's.

    Args:
        x: (b, l, c).  weight: (c, k).  bias: (c,) or None.
        activation: ``silu`` or ``none``.
        initial_state: (b, k-1, c), or (s, k-1, c) with ``cu_seqlens``: the inputs that precede; zeros when absent.
        cu_seqlens: (s+1,) borders of the sequences in a packed row (then b = 1); nothing leaks across them.
        return_final_state: also return the last k-1 inputs of each sequence.
        rotation: cosines and sines of each token, (b, l, 1, p/2), for heads of p channels whose first half is paired
            with the second. They get no gradient.
        rotate_from: the first channel that is rotated (v stands in front of k and q), a multiple of p.

    Returns:
        y (b, l, c) and the final state, shaped as ``initial_state``, or None.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    arguments: dict[str, Any] = {
        "activation": activation,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "return_final_state": return_final_state,
        "rotation": rotation,
        "rotate_from": rotate_from,
    }
    if serves(x, weight, bias, initial_state, conv_kernel=weight.shape[1]):
        from mmmamba.ops.triton.conv import causal_conv as kernel

        return kernel(x, weight, bias, **arguments)
    return causal_conv_torch(x, weight, bias, **arguments)


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
    k = weight.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = x.new_zeros(rows, k - 1, x.shape[2])
    if tuple(initial_state.shape) != (rows, k - 1, x.shape[2]):
        raise ValueError(
            f"conv: initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k - 1, x.shape[2])}"
        )
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
    y = _activate(y, activation)
    if rotation is not None:
        cos, sin = rotation
        heads = y[..., rotate_from:].unflatten(-1, (-1, 2 * cos.shape[-1]))
        y = torch.cat([y[..., :rotate_from], rotate(heads, cos, sin).flatten(-2)], dim=-1)
    return y, final


def causal_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """One token for each row: x (b, c), state (b, k-1, c) → y (b, c), new state (b, k-1, c)."""
    y, new = causal_conv(x[:, None], weight, bias, activation=activation, initial_state=state, return_final_state=True)
    assert new is not None
    return y[:, 0], new
