"""The chunked delta rule against the sequential one in float64: values, states and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops import gated_delta, gated_delta_chunked, gated_delta_reference, gated_delta_step


def inputs(lengths, g=2, r=2, p=4, n=3, packed=True, seed=0, dtype=torch.float64):
    """(v, dt, A, k, q, beta), the initial state and cu_seqlens; keys of unit length."""
    torch.manual_seed(seed)
    b, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    h = g * r

    def make(*shape):
        return torch.randn(*shape, dtype=dtype)

    dt, beta = torch.rand(2, b, length, h, dtype=dtype)
    A = -2 * torch.rand(h, dtype=dtype)
    keys = F.normalize(make(b, length, g, n), dim=-1)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) if packed else None
    args = (make(b, length, g, p), dt, A, keys, make(b, length, h, n), beta)
    return tuple(t.requires_grad_() for t in args), make(len(lengths), h, p, n).requires_grad_(), cu


def everything(function, args, state, cu, **options):
    y, final = function(*args, initial_state=state, cu_seqlens=cu, return_final_state=True, **options)
    torch.manual_seed(1)
    loss = (y * torch.randn_like(y)).sum() + (final * torch.randn_like(final)).sum()
    return (y, final, *torch.autograd.grad(loss, [*args, state]))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum),
    chunk=st.sampled_from([16, 32, 64]),
    g=st.integers(1, 3),
    r=st.integers(1, 3),
)
def test_packed_chunks_equal_the_recurrence_with_gradients(lengths, chunk, g, r):
    args, state, cu = inputs(lengths, g, r)
    ours = everything(gated_delta_chunked, args, state, cu, chunk=chunk)
    for mine, truth in zip(ours, everything(gated_delta_reference, args, state, cu), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


def test_batch_equals_packed_rows_equals_sequences_alone():
    args, state, _ = inputs([70, 70], packed=False)
    y, final = gated_delta(*args, initial_state=state, return_final_state=True)
    flat = [t.flatten(0, 1)[None] if t.ndim > 1 else t for t in args]
    cu = torch.tensor([0, 70, 140], dtype=torch.int32)
    packed, last = gated_delta(*flat, initial_state=state, cu_seqlens=cu, return_final_state=True)
    torch.testing.assert_close(y.flatten(0, 1), packed[0])
    torch.testing.assert_close(final, last)
    for row in range(2):
        one = [t[row : row + 1] if t.ndim > 1 else t for t in args]
        torch.testing.assert_close(gated_delta(*one, initial_state=state[row : row + 1])[0], y[row : row + 1])


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 99))
def test_any_split_of_a_sequence_gives_the_same(cut):
    args, _, _ = inputs([100], packed=False)
    whole, final = gated_delta(*args, return_final_state=True)
    first, second = ([t[:, at] if t.ndim > 1 else t for t in args] for at in (slice(cut), slice(cut, None)))
    one, state = gated_delta(*first, return_final_state=True)
    two, last = gated_delta(*second, initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat([one, two], 1), whole)
    torch.testing.assert_close(last, final)


def test_steps_equal_the_recurrence():
    args, state, _ = inputs([9, 9], packed=False)
    truth, final = gated_delta_reference(*args, initial_state=state, return_final_state=True)
    v, dt, A, k, q, beta = args
    ys, now = [], state
    for t in range(9):
        y, now = gated_delta_step(v[:, t], dt[:, t], A, k[:, t], q[:, t], beta[:, t], now)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), truth)
    torch.testing.assert_close(now, final)


def test_it_is_the_papers_recurrence():
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, with its matrices written out."""
    (v, dt, A, k, q, beta), state, _ = inputs([6], g=1, r=1, packed=False)
    now = state[0, 0]
    for t in range(6):
        key, value, strength = k[0, t, 0], v[0, t, 0], beta[0, t, 0]
        forget = torch.eye(3, dtype=torch.float64) - strength * key[:, None] * key[None, :]
        now = torch.exp(dt[0, t, 0] * A[0]) * now @ forget + strength * value[:, None] * key[None, :]
    y, final = gated_delta_reference(v, dt, A, k, q, beta, initial_state=state, return_final_state=True)
    torch.testing.assert_close(final[0, 0], now)
    torch.testing.assert_close(y[0, -1, 0], now @ q[0, -1, 0])


def test_a_key_gives_back_what_was_last_written_under_it():
    """With beta of 1 a state without decay is a dictionary; a sum of values would be what ssd holds."""
    (v, dt, A, k, _, beta), _, _ = inputs([20], g=1, r=1, packed=False)
    again = torch.cat([k[:, :19], k[:, 4:5]], 1)
    y, _ = gated_delta(v, dt, torch.zeros_like(A), again, again, torch.ones_like(beta))
    torch.testing.assert_close(y[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("alike", [0.0, 1.0], ids=["random keys", "one key"])
def test_float32_stays_close_over_a_long_sequence(alike):
    """Also where all keys are the same, at full strength: the system's inverse is tame, its powers would not be."""
    (v, dt, A, k, q, beta), _, _ = inputs([2000], g=1, r=2, p=16, n=16, packed=False)
    k = F.normalize((1 - alike) * k + alike * k[:, :1], dim=-1)
    strength = beta if alike == 0 else torch.ones_like(beta)
    args = [t.detach() for t in (v, 0.01 * dt, A, k, q, strength)]
    truth, _ = gated_delta_reference(*args)
    ours, _ = gated_delta(*(t.float() for t in args))
    assert float((ours - truth).abs().max()) < 1e-4 * float(truth.abs().max())


def test_wrong_shapes_are_named():
    args, state, cu = inputs([5, 4])
    v, dt, A, k, q, beta = args
    with pytest.raises(ValueError, match="k has shape"):
        gated_delta_chunked(v, dt, A, k[..., :2], q, beta)
    with pytest.raises(ValueError, match="beta has shape"):
        gated_delta_chunked(v, dt, A, k, q, beta[..., :2])
    with pytest.raises(ValueError, match="initial_state"):
        gated_delta_chunked(*args, initial_state=state[:1], cu_seqlens=cu)
    with pytest.raises(ValueError, match="ends at 8"):
        gated_delta_chunked(*args, cu_seqlens=torch.tensor([0, 8]))
