"""Which shapes fit together in one step of attention over a cache."""

from __future__ import annotations

from torch import Tensor


def check_shapes(qkv: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, frequencies: Tensor) -> int:
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
            raise ValueError(f"attention_step: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if h < 1 or h % g:
        raise ValueError(f"attention_step: {h} heads are not a multiple of {g} groups")
    return h
