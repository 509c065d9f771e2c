"""The gated delta rule in PyTorch: token by token, one step, and in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.ops.gated_delta.shapes import check_shapes
from mmmamba.ops.packing import Layout, chunk_size, layout_for


def gated_delta_reference(
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
    """Compute the recurrence token by token, in the precision of the inputs. Same contract as :func:`gated_delta`."""
    layout = layout_for(v, cu_seqlens)
    check_shapes(v, dt, A, k, q, beta, initial_state, layout.sequences)
    h, p, n = q.shape[2], v.shape[3], q.shape[3]
    repeat = h // v.shape[2]
    expanded = (v.repeat_interleave(repeat, 2), dt, k.repeat_interleave(repeat, 2), q, beta)
    flat = [t.flatten(0, 1) for t in expanded]
    ys, finals = [], []
    start = 0
    for row, length in enumerate(layout.lengths):
        state = v.new_zeros(h, p, n) if initial_state is None else initial_state[row]
        for t in range(start, start + length):
            v_t, dt_t, k_t, q_t, beta_t = (tensor[t] for tensor in flat)
            state = torch.exp(dt_t * A)[:, None, None] * state
            held = (state * k_t[:, None, :]).sum(-1)
            written = beta_t[:, None] * (v_t - held)
            state = state + written[:, :, None] * k_t[:, None, :]
            ys.append((state * q_t[:, None, :]).sum(-1))
        start += length
        finals.append(state)
    y = torch.stack(ys).view(*q.shape[:2], h, p) if ys else v.new_zeros(*q.shape[:2], h, p)
    return y, torch.stack(finals) if return_final_state else None


def gated_delta_chunked(
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence as products and one solve inside chunks. Same contract as :func:`gated_delta`.

    Works in float32 (float64 for float64 inputs); memory grows with length × chunk.
    """
    layout = layout_for(v, cu_seqlens)
    check_shapes(v, dt, A, k, q, beta, initial_state, layout.sequences)
    with torch.autocast(v.device.type, enabled=False):
        size = chunk or chunk_size(layout.longest, v.shape[3])
        return _chunked(v, dt, A, k, q, beta, initial_state, layout, return_final_state, size)


def _chunked(
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    layout: Layout,
    return_final_state: bool,
    size: int,
) -> tuple[Tensor, Tensor | None]:
    g, p, h, n = v.shape[2], v.shape[3], q.shape[2], q.shape[3]
    r = h // g
    work = torch.float64 if v.dtype == torch.float64 else torch.float32
    table = layout.chunks(size)
    c = table.gather.shape[0]

    def cut(t: Tensor) -> Tensor:  # (b, l, heads, …) → (c, heads, size, …)
        return t.flatten(0, 1).index_select(0, table.gather.flatten()).view(c, size, *t.shape[2:]).transpose(1, 2)

    # After a sequence's end nothing decays and nothing is written.
    inside = table.valid[:, None]  # (c, 1, size)
    log_decay = torch.where(inside, cut(dt.to(work)) * A.to(work)[:, None], 0).cumsum(-1)  # (c, h, size), inclusive
    strength = torch.where(inside, cut(beta.to(work)), 0)[..., None]  # (c, h, size, 1)
    values, keys, queries = cut(v.to(work)), cut(k.to(work)), cut(q.to(work))  # (c, g | g | h, size, p | n | n)
    decayed = log_decay.exp()[..., None]  # since the chunk began
    to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]
    past = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~past, float("-inf")).exp()

    # What is written is linear in the entering state S: u = fresh - held S^T.
    gram = (keys @ keys.mT).repeat_interleave(r, 1)  # (c, h, size, size)
    lower = (strength * between * gram).tril(-1)
    keys_of_heads = keys.repeat_interleave(r, 1)
    asked = torch.cat([values.repeat_interleave(r, 1), decayed * keys_of_heads], -1) * strength
    fresh, held = torch.linalg.solve_triangular(lower, asked, upper=False, unitriangular=True).split([p, n], -1)

    whole = decayed[..., -1:, :]  # (c, h, 1, 1)
    leaving_keys = to_end * keys_of_heads
    carry = v.new_zeros(layout.sequences, h, p, n, dtype=work)
    if initial_state is not None:
        carry = initial_state.to(work).index_select(0, table.order)
    entering, writes, finished, row = [], [], [], 0
    for count in table.counts:
        if count < carry.shape[0]:
            finished.append(carry[count:])
            carry = carry[:count]
        now = slice(row, row + count)
        written = fresh[now] - held[now] @ carry.mT  # (count, h, size, p)
        entering.append(carry)
        writes.append(written)
        carry = whole[now] * carry + written.mT @ leaving_keys[now]
        row += count
    before = torch.cat(entering) if entering else carry[:0]  # (c, h, p, n)
    written = torch.cat(writes) if writes else fresh

    scores = (queries.reshape(c, g, r * size, n) @ keys.mT).view(c, h, size, size)
    y = (scores * between) @ written + (decayed * queries) @ before.mT
    y = y.transpose(1, 2).reshape(c * size, h, p).index_select(0, table.scatter)
    y = y.view(*q.shape[:2], h, p).to(v.dtype)
    if not return_final_state:
        return y, None
    by_length = torch.cat([carry, *reversed(finished)])
    return y, torch.empty_like(by_length).index_copy(0, table.order, by_length)


def gated_delta_step(
    v: Tensor, dt: Tensor, A: Tensor, k: Tensor, q: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute one token of the recurrence for each row of a batch.

    Args:
        v: (b, g, p).  dt, beta: (b, h).  A: (h,).  k: (b, g, n).  q: (b, h, n).  state: (b, h, p, n).

    Returns:
        y (b, h, p) in v's dtype and the new state (b, h, p, n).
    """
    b, g, p = v.shape
    h, n = q.shape[1], q.shape[2]
    wide = state.dtype
    decay = torch.exp(dt.to(wide) * A.to(wide)).view(b, g, h // g, 1, 1)
    key = k.to(wide)[:, :, None, :, None]  # (b, g, 1, n, 1)
    faded = decay * state.view(b, g, h // g, p, n)
    written = beta.to(wide).view(b, g, h // g, 1, 1) * (v.to(wide)[:, :, None, :, None] - faded @ key)
    new = (faded + written * key.mT).view(b, h, p, n)
    y = (new @ q.to(wide)[..., None]).squeeze(-1)
    return y.to(v.dtype), new
