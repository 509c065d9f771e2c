"""Linear maps as the model uses them, against plain products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba.ops import joined_linear, linear_add, linear_step, linear_wide, quantize_rows


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), biased=st.booleans(), rows=st.integers(0, 5))
def test_joined_maps_are_the_maps_with_and_without_gradients(sizes, biased, rows):
    torch.manual_seed(sum(sizes))
    x = torch.randn(2, rows, 7, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 7, dtype=torch.float64) for n in sizes]
    biases = [torch.randn(n, dtype=torch.float64) if biased else None for n in sizes]
    truth = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    joined = joined_linear(x, weights, biases)
    assert joined.requires_grad
    torch.testing.assert_close(joined, truth)
    with torch.no_grad():
        torch.testing.assert_close(joined_linear(x, weights, biases), truth.detach())


def test_added_and_wide_maps():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 5), torch.randn(5, 8)
    torch.testing.assert_close(linear_add(residual, x, weight), residual + x @ weight.T)
    with torch.no_grad():
        torch.testing.assert_close(linear_add(residual, x, weight), residual + x @ weight.T)
    half, weight = x.bfloat16(), weight.bfloat16()
    wide = linear_wide(half, weight)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), half.double() @ weight.double().T, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(1, 40), power=st.integers(-20, 20))
def test_rows_in_int8_are_off_by_half_a_step_at_most(n, k, power):
    torch.manual_seed(n * 41 + k)
    weight = torch.randn(n, k) * 2.0**power
    weight[0] = 0
    rounded, scale = quantize_rows(weight)
    assert rounded.dtype == torch.int8 and scale.shape == (n,)
    assert ((rounded * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    x = torch.randn(3, k)
    torch.testing.assert_close(
        linear_step(x, rounded, scale=scale), x @ (rounded * scale[:, None]).T, rtol=1e-5, atol=1e-5 * 2.0**power
    )
