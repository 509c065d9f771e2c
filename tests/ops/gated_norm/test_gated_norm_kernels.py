"""The gated norm's kernels against the twin in float64: values, every gradient, twice the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba import ops as twin

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3}


def kernel(*args):
    from mmmamba.ops.gated_norm.kernels import gated_norm

    return gated_norm(*args)


def run(function, x, gate, weight, dout, eps=1e-5):
    leaves = [t.detach().clone().requires_grad_() for t in (x, gate, weight)]
    out = function(*leaves, eps)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def error(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def draw(shape, dtype, device, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64).to(device, dtype) for s in (shape, shape, shape[-1:], shape)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 37, 3, 128), (5, 80), (300, 64), (600, 128)])
def test_equals_the_twin_in_float64(shape, dtype, device):
    tensors = draw(shape, dtype, device)
    for ours, truth in zip(run(kernel, *tensors), run(twin.gated_norm, *[t.double() for t in tensors]), strict=True):
        assert ours.dtype == dtype
        assert error(ours, truth) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 70), p=st.integers(1, 40), scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
def test_any_size_and_scale(rows, p, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gate, weight, dout = draw((rows, p), torch.float64, device, rows)
    for ours, truth in zip(
        run(kernel, x * scale, gate, weight, dout), run(twin.gated_norm, x * scale, gate, weight, dout), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_few_programs_take_many_tiles_each(monkeypatch, device):
    from mmmamba.ops.gated_norm import kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    tensors = draw((101, 128), torch.float64, device)
    for ours, truth in zip(run(kernel, *tensors), run(twin.gated_norm, *tensors), strict=True):
        assert error(ours, truth) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("programs", [0, 1, 600])
def test_partial_sums_of_taps_and_bias(programs, device):
    from mmmamba.ops.sum_kernels import sum_partial

    partial = torch.randn(programs, 3, 20, dtype=torch.float64, device=device)
    dweight, dbias = partial.new_empty(20, 2), partial.new_empty(20)
    sum_partial(partial, dweight, dbias)
    torch.testing.assert_close(dweight, partial[:, :2].sum(0).T)
    torch.testing.assert_close(dbias, partial[:, 2].sum(0))
    whole = partial.new_empty(20, 3)
    sum_partial(partial, whole)
    torch.testing.assert_close(whole, partial.sum(0).T)


def test_two_runs_have_the_same_bits_and_slices_are_taken(device):
    x, gate, weight, dout = draw((500, 2, 64), torch.float32, device)
    first, second = run(kernel, x, gate, weight, dout), run(kernel, x, gate, weight, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(kernel(x[:, :1], gate[:, 1:], weight, 1e-5), kernel(x, gate.flip(1), weight, 1e-5)[:, :1])


def test_mixed_dtypes_promote_as_the_twins_do(device):
    x, gate, weight, _ = draw((4, 32), torch.float32, device)
    assert kernel(x.bfloat16(), gate, weight, 1e-5).dtype == torch.float32
    assert kernel(x.bfloat16(), gate.bfloat16(), weight, 1e-5).dtype == torch.bfloat16


def test_is_a_sound_custom_op(device):
    from mmmamba.ops.gated_norm.kernels import _forward

    x, gate, weight, _ = draw((3, 32), torch.float32, device)
    torch.library.opcheck(_forward.traced, [t.requires_grad_() for t in (x, gate, weight)] + [1e-5])


def test_refuses_shapes_that_do_not_fit(device):
    x, gate, weight, _ = draw((3, 32), torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        kernel(x, gate[:2], weight, 1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        kernel(x, gate, weight[:4], 1e-5)
