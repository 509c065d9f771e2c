"""Depthwise causal convolution over time, with state and packed rows, and the rotation that may follow it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmmamba.ops.causal_conv.reference import causal_conv_torch
from mmmamba.ops.dispatch import serves

__all__ = ["causal_conv", "causal_conv_step", "causal_conv_torch"]


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
        rotate_from: the first channel that is rotated (v comes before k and q), a multiple of p.

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
        from mmmamba.ops.causal_conv.launch import causal_conv as kernel

        return kernel(x, weight, bias, **arguments)
    return causal_conv_torch(x, weight, bias, **arguments)


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
