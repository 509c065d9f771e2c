"""Which shapes fit together in a call of the causal convolution."""

from __future__ import annotations

from torch import Tensor


def check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    b, c, k = x.shape[0], x.shape[2], weight.shape[1]
    rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if activation not in ("silu", "none"):
        raise ValueError(f"conv activation must be 'silu' or 'none', got {activation!r}")
    if weight.shape[0] != c:
        raise ValueError(f"conv: weight has shape {tuple(weight.shape)}, expected {(c, k)}")
    if bias is not None and tuple(bias.shape) != (c,):
        raise ValueError(f"conv: bias has shape {tuple(bias.shape)}, expected {(c,)}")
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"conv: with cu_seqlens x has one row, got {b}")
    if initial_state is not None and tuple(initial_state.shape) != (rows, k - 1, c):
        raise ValueError(f"conv: initial_state has shape {tuple(initial_state.shape)}, expected {(rows, k - 1, c)}")
