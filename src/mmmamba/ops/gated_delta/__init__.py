"""The gated delta rule: a recurrence that removes what the state holds under a key, then writes the new value there.

For head j with key/value group k(j) = j // (h/g), decay A_j < 0, step size dt and strength beta in [0, 1]::

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        (p, n), a_t = exp(dt_t A)
        = a_t S_{t-1} + u_t k_t^T,  u_t = beta_t (v_t - a_t S_{t-1} k_t)
    y_t = S_t q_t                                                      (p,)

(Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks", arXiv 2412.06464.) Keys have unit length; with longer ones a
step may let the state grow. While :func:`mmmamba.ops.ssd` adds to what a key already has, this replaces it: with beta
of 1 the state gives v_t for k_t, no matter what it held before.

The second line is the state space recurrence with u for its inputs. Inside a chunk of q tokens with inclusive log
decays c_i and entering state S, the u obey a unit lower triangular system, which is solved for all chunks at once (the
WY form of the paper)::

    u_i + beta_i sum_{j<i} exp(c_i - c_j) (k_i.k_j) u_j = beta_i (v_i - exp(c_i) S k_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.gated_delta.reference import gated_delta_chunked, gated_delta_reference, gated_delta_step
from mmmamba.ops.gated_delta.shapes import check_shapes

__all__ = ["gated_delta", "gated_delta_chunked", "gated_delta_reference", "gated_delta_step"]


def gated_delta(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule over whole sequences, with gradients through every input and both states.

    Args:
        v: (b, l, g, p) values, one per key/value group; group k serves heads k·h/g … (k+1)·h/g-1.
        dt: (b, l, h) step sizes after softplus, float32.
        A: (h,) negative decay rates.
        k: (b, l, g, n) keys of unit length.
        q: (b, l, h, n) queries.
        beta: (b, l, h) which share of what the state holds under the key is replaced, in [0, 1], float32.
        initial_state: (b, h, p, n), or (s, h, p, n) with ``cu_seqlens``; zeros when absent.
        cu_seqlens: (s+1,) borders of the sequences in a packed row (then b = 1).
        return_final_state: also return the state after the last token of each sequence.

    Returns:
        y (b, l, h, p) in v's dtype, and the final state (float32, or float64 for float64 inputs) or None.

    Raises:
        ValueError: for shapes that do not fit together; the message names the tensor.
    """
    if v.shape[1] == 1 and cu_seqlens is None and initial_state is not None and not torch.is_grad_enabled():
        check_shapes(v, dt, A, k, q, beta, initial_state, v.shape[0])
        y, state = gated_delta_step(v[:, 0], dt[:, 0], A, k[:, 0], q[:, 0], beta[:, 0], initial_state)
        return y[:, None], state if return_final_state else None
    if serves(v, dt, A, k, q, beta, initial_state, head_dim=v.shape[3], state_dim=q.shape[3]):
        from mmmamba.ops.gated_delta.launch import gated_delta as kernel

        return kernel(
            v, dt, A, k, q, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )  # fmt: skip
    return gated_delta_chunked(
        v, dt, A, k, q, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, return_final_state=return_final_state
    )
