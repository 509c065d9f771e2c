"""The state space recurrence of Mamba-2 (SSD).

For head j with key/value group k(j) = j // (h/g), decay A_j < 0 and step size dt (after softplus)::

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        (p, n)
    y_t = S_t C_t                                     (p,)

(Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060, equation 1 and the block decomposition of section 6; here
without the skip D.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.ssd.reference import ssd_chunked, ssd_reference, ssd_step
from mmmamba.ops.ssd.shapes import check_shapes

__all__ = ["ssd", "ssd_chunked", "ssd_reference", "ssd_step"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the state space recurrence over whole sequences, with gradients through every input and both states.

    Args:
        x: (b, l, g, p) inputs (the values), one per key/value group; group k serves heads k·h/g … (k+1)·h/g-1.
        dt: (b, l, h) step sizes after softplus, float32.
        A: (h,) negative decay rates.
        B: (b, l, g, n) input directions (the keys).
        C: (b, l, h, n) read-out directions (the queries).
        initial_state: (b, h, p, n), or (s, h, p, n) with ``cu_seqlens``; zeros when absent.
        cu_seqlens: (s+1,) borders of the sequences in a packed row (then b = 1).
        return_final_state: also return the state after the last token of each sequence.

    Returns:
        y (b, l, h, p) in x's dtype, and the final state (float32, or float64 for float64 inputs) or None.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    if x.shape[1] == 1 and cu_seqlens is None and initial_state is not None and not torch.is_grad_enabled():
        check_shapes(x, dt, A, B, C, initial_state, x.shape[0])
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], initial_state)
        return y[:, None], state if return_final_state else None
    if serves(x, dt, A, B, C, initial_state, head_dim=x.shape[3], state_dim=C.shape[3]):
        from mmmamba.ops.ssd.launch import ssd as kernel

        return kernel(
            x, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state
        )
    return ssd_chunked(
        x, dt, A, B, C, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state
    )
