"""The state space recurrence in PyTorch: token by token, one step, and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.packing import Layout, chunk_size, layout_for
from mmmamba.ops.ssd.shapes import check_shapes


def ssd_reference(
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
    """Compute the recurrence token by token, in the precision of the inputs. Same contract as :func:`ssd`."""
    layout = layout_for(x, cu_seqlens)
    check_shapes(x, dt, A, B, C, initial_state, layout.sequences)
    h, p, n = C.shape[2], x.shape[3], C.shape[3]
    repeat = h // x.shape[2]
    flat = [t.flatten(0, 1) for t in (x.repeat_interleave(repeat, 2), dt, B.repeat_interleave(repeat, 2), C)]
    ys, finals = [], []
    start = 0
    for row, length in enumerate(layout.lengths):
        state = x.new_zeros(h, p, n) if initial_state is None else initial_state[row]
        for t in range(start, start + length):
            x_t, dt_t, B_t, C_t = (tensor[t] for tensor in flat)
            decay = torch.exp(dt_t * A)[:, None, None]
            state = decay * state + dt_t[:, None, None] * x_t[:, :, None] * B_t[:, None, :]
            ys.append((state * C_t[:, None, :]).sum(-1))
        start += length
        finals.append(state)
    y = torch.stack(ys).view(*C.shape[:2], h, p) if ys else x.new_zeros(*C.shape[:2], h, p)
    return y, torch.stack(finals) if return_final_state else None


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute it as matrix products inside chunks and a recurrence between them. Same contract as :func:`ssd`.

    Works in float32 (float64 for float64 inputs); memory grows with length × chunk. Groups are folded into the rows of
    the products, never expanded to heads, but for the weighted inputs of the chunk states.
    """
    layout = layout_for(x, cu_seqlens)
    check_shapes(x, dt, A, B, C, initial_state, layout.sequences)
    with torch.autocast(x.device.type, enabled=False):
        size = chunk or chunk_size(layout.longest, x.shape[3])
        return _chunked(x, dt, A, B, C, initial_state, layout, return_final_state, size)


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    layout: Layout,
    return_final_state: bool,
    q: int,
) -> tuple[Tensor, Tensor | None]:
    g, p, h, n = x.shape[2], x.shape[3], C.shape[2], C.shape[3]
    r = h // g
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = layout.chunks(q)
    c = table.gather.shape[0]

    def cut(t: Tensor) -> Tensor:  # (b, l, …) → (c, q, …)
        return t.flatten(0, 1).index_select(0, table.gather.flatten()).view(c, q, *t.shape[2:])

    dt_c = torch.where(table.valid[..., None], cut(dt.to(work)), 0).transpose(
        1, 2
    )  # (c, h, q); 0 leaves the state alone
    x_c = cut(x).to(work).transpose(1, 2)  # (c, g, q, p)
    B_c = cut(B).to(work).transpose(1, 2)  # (c, g, q, n)
    C_c = cut(C).to(work).view(c, q, g, r, n).permute(0, 2, 3, 1, 4)  # (c, g, r, q, n)
    log_decay = (dt_c * A.to(work)[:, None]).cumsum(-1)  # (c, h, q), inclusive

    # Inside a chunk: y_i = sum_{j<=i} exp(a_i - a_j) dt_j (C_i . B_j) x_j.
    scores = (C_c.reshape(c, g, r * q, n) @ B_c.transpose(-1, -2)).view(c, h, q, q)
    future = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    relative = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, float("-inf"))
    weights = scores * relative.exp() * dt_c[..., None, :]
    y = (weights.view(c, g, r * q, q) @ x_c).view(c, h, q, p)

    # Between chunks: what each chunk adds to the state, then the recurrence over the chunks of each sequence.
    to_end = (log_decay[..., -1:] - log_decay).exp() * dt_c  # (c, h, q)
    weighted = x_c[:, :, None] * to_end.view(c, g, r, q, 1)  # (c, g, r, q, p)
    added = weighted.transpose(-1, -2).reshape(c, g, r * p, q) @ B_c  # (c, g, r·p, n)
    added = added.view(c, h, p, n)
    decay = log_decay[..., -1].exp()[..., None, None]  # (c, h, 1, 1)

    carry = x.new_zeros(layout.sequences, h, p, n, dtype=work)
    if initial_state is not None:
        carry = initial_state.to(work).index_select(0, table.order)
    entering, finished, row = [], [], 0
    for count in table.counts:
        if count < carry.shape[0]:
            finished.append(carry[count:])
            carry = carry[:count]
        entering.append(carry)
        carry = carry * decay[row : row + count] + added[row : row + count]
        row += count
    if len(table.counts) > 1 or initial_state is not None:
        before = torch.cat(entering) if entering else carry[:0]  # (c, h, p, n)
        read = (C_c.reshape(c, h, q, n) * log_decay.exp()[..., None]) @ before.transpose(-1, -2)
        y = y + read

    y = y.transpose(1, 2).reshape(c * q, h, p).index_select(0, table.scatter)
    y = y.view(*C.shape[:2], h, p).to(x.dtype)
    if not return_final_state:
        return y, None
    by_length = torch.cat([carry, *reversed(finished)])
    final = torch.empty_like(by_length).index_copy(0, table.order, by_length)
    return y, final


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one token of the recurrence for each row of a batch.

    Args:
        x: (b, g, p).  dt: (b, h).  A: (h,).  B: (b, g, n).  C: (b, h, n).  state: (b, h, p, n).

    Returns:
        y (b, h, p) in x's dtype and the new state (b, h, p, n).
    """
    b, g, p = x.shape
    h, n = C.shape[1], C.shape[2]
    grouped = state.view(b, g, h // g, p, n)
    dt = dt.to(state.dtype)
    decay = torch.exp(dt * A.to(state.dtype)).view(b, g, h // g, 1, 1)
    outer = x.to(state.dtype)[:, :, None, :, None] * B.to(state.dtype)[:, :, None, None, :]  # (b, g, 1, p, n)
    new = decay * grouped + dt.view(b, g, h // g, 1, 1) * outer
    new = new.view(b, h, p, n)
    y = (new @ C.to(state.dtype)[..., None]).squeeze(-1)
    return y.to(x.dtype), new
