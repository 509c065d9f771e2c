"""The chunked recurrence against the sequential one in float64: values, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops import ssd, ssd_chunked, ssd_reference, ssd_step


def inputs(lengths, g=2, r=2, p=4, n=3, packed=True, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    b, length = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    h = g * r

    def make(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    dt = torch.rand(b, length, h, dtype=dtype).requires_grad_()
    A = (-2 * torch.rand(h, dtype=dtype)).requires_grad_()
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) if packed else None
    state = make(len(lengths), h, p, n)
    return (make(b, length, g, p), dt, A, make(b, length, g, n), make(b, length, h, n)), state, cu


def everything(function, args, state, cu, **options):
    y, final = function(*args, initial_state=state, cu_seqlens=cu, return_final_state=True, **options)
    torch.manual_seed(1)
    loss = (y * torch.randn_like(y)).sum() + (final * torch.randn_like(final)).sum()
    return (y, final, *torch.autograd.grad(loss, [*args, state]))


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum),
    chunk=st.sampled_from([16, 32, 64]),
    g=st.integers(1, 3),
    r=st.integers(1, 3),
)
def test_packed_chunks_equal_the_recurrence_with_gradients(lengths, chunk, g, r):
    args, state, cu = inputs(lengths, g, r)
    for ours, truth in zip(
        everything(ssd_chunked, args, state, cu, chunk=chunk), everything(ssd_reference, args, state, cu), strict=False
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


def test_batch_equals_packed_rows():
    args, state, _ = inputs([70, 70], packed=False)
    rows = everything(ssd_chunked, args, state, None)
    flat = [t.flatten(0, 1)[None] if t.ndim > 1 else t for t in args]
    cu = torch.tensor([0, 70, 140], dtype=torch.int32)
    packed = everything(ssd_chunked, flat, state, cu)
    torch.testing.assert_close(rows[0].flatten(0, 1), packed[0][0])
    torch.testing.assert_close(rows[1], packed[1])


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 99))
def test_any_split_of_a_sequence_gives_the_same(cut):
    (x, dt, A, B, C), _, _ = inputs([100], packed=False)
    whole, final = ssd(x, dt, A, B, C, return_final_state=True)
    first, state = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], return_final_state=True)
    second, last = ssd(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, final)


def test_steps_equal_the_recurrence():
    (x, dt, A, B, C), state, _ = inputs([9, 9], packed=False)
    truth, final = ssd_reference(x, dt, A, B, C, initial_state=state, return_final_state=True)
    ys, now = [], state
    for t in range(9):
        y, now = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], now)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), truth)
    torch.testing.assert_close(now, final)


def test_float32_stays_close_over_a_long_strongly_decaying_sequence():
    args, _, _ = inputs([3000], g=1, r=2, packed=False)
    truth, _ = ssd_reference(*args)
    ours, _ = ssd(*(t.detach().float() for t in args))
    assert float((ours - truth).abs().max()) < 1e-4 * float(truth.abs().max())


def test_wrong_shapes_are_named():
    args, state, cu = inputs([5, 4])
    with pytest.raises(ValueError, match="B has shape"):
        ssd_chunked(*args[:3], args[3][..., :2], args[4])
    with pytest.raises(ValueError, match="initial_state"):
        ssd_chunked(*args, initial_state=state[:1], cu_seqlens=cu)
    with pytest.raises(ValueError, match="ends at 8"):
        ssd_chunked(*args, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="start at 0"):
        ssd_chunked(*args, cu_seqlens=torch.tensor([1, 9]))
