"""Which shapes fit together in a call of the gated delta rule."""

from __future__ import annotations

from torch import Tensor


def check_shapes(
    v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor, state: Tensor | None, rows: int
) -> None:
    """Refuse what does not fit together (ValueError naming the tensor)."""
    b, length, g, p = v.shape
    h, n = q.shape[2], q.shape[3]
    expected = {
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "k": (k, (b, length, g, n)),
        "q": (q, (b, length, h, n)),
        "beta": (beta, (b, length, h)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise ValueError(f"gated_delta: {name} has shape {found}, expected {shape} for v {tuple(v.shape)}")
    if h % g:
        raise ValueError(f"gated_delta: {h} heads are not a multiple of {g} groups")
    if state is not None and tuple(state.shape) != (rows, h, p, n):
        raise ValueError(f"gated_delta: initial_state has shape {tuple(state.shape)}, expected {(rows, h, p, n)}")
