"""Which shapes fit together in a call of the state space recurrence."""

from __future__ import annotations

from torch import Tensor


def check_shapes(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, rows: int) -> None:
    b, length, g, p = x.shape
    h, n = C.shape[2], C.shape[3]
    expected = {"dt": (dt, (b, length, h)), "A": (A, (h,)), "B": (B, (b, length, g, n)), "C": (C, (b, length, h, n))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} has shape {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
    if h % g:
        raise ValueError(f"ssd: {h} heads are not a multiple of {g} groups")
    if state is not None and tuple(state.shape) != (rows, h, p, n):
        raise ValueError(f"ssd: initial_state has shape {tuple(state.shape)}, expected {(rows, h, p, n)}")
