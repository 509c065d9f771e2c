"""The norms of rows, and the rotation, against their twins in float64: values, every gradient, twice the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba import ops as twin
from mmmamba.ops import rotate_torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 6e-3}


def error(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def run(function, tensors, dout):
    """The value, and the gradients of the first and the second tensor (if there is one)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def rms(dtype=None):
    from mmmamba.ops.norm.kernels import rms_norm

    return lambda x, weight: rms_norm(x, weight, 1e-5, dtype or x.dtype)


def unit():
    from mmmamba.ops.norm.kernels import unit_norm

    return unit_norm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 37, 3, 64), (5, 80), (70, 576)])
def test_norms_equal_their_twins_in_float64(shape, dtype, device):
    torch.manual_seed(0)
    x, dout = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    weight = torch.rand(shape[-1], dtype=torch.float64).to(device, dtype) + 0.5
    truth = run(lambda x, w: twin.rms_norm_torch(x, w, 1e-5), [x.double(), weight.double()], dout)
    for ours, right in zip(run(rms(), [x, weight], dout), truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, right) < TOLERANCE[dtype]
    truth = run(twin.unit_norm_torch, [x.double()], dout)
    for ours, right in zip(run(unit(), [x], dout), truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, right) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 70), p=st.integers(1, 40), scale=st.sampled_from([0.0, 1e-14, 1.0, 1e4]))
def test_any_size_and_scale(rows, p, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(rows)
    x, dout = (torch.randn(rows, p, dtype=torch.float64, device=device) for _ in range(2))
    x *= scale
    weight = torch.rand(p, dtype=torch.float64, device=device)
    for ours, truth in zip(
        run(rms(), [x, weight], dout),
        run(lambda x, w: twin.rms_norm_torch(x, w, 1e-5), [x, weight], dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth)
    for ours, truth in zip(run(unit(), [x], dout), run(twin.unit_norm_torch, [x], dout), strict=True):
        torch.testing.assert_close(ours, truth)


def test_a_norm_is_written_in_the_dtype_of_its_reader(device):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64, device=device), torch.rand(64, device=device)
    out = rms(torch.bfloat16)(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, twin.rms_norm_torch(x, weight, 1e-5, torch.bfloat16))
    leaf = x.clone().requires_grad_()
    rms(torch.bfloat16)(leaf, weight).float().sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32


def test_a_frozen_weight_costs_no_sums_and_few_programs_take_many_tiles(monkeypatch, device):
    from mmmamba.ops.norm import kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    torch.manual_seed(0)
    x, dout = (torch.randn(301, 128, dtype=torch.float64, device=device) for _ in range(2))
    weight = torch.rand(128, dtype=torch.float64, device=device)
    truth = run(lambda x, w: twin.rms_norm_torch(x, w, 1e-5), [x, weight], dout)
    for ours, right in zip(run(rms(), [x, weight], dout), truth, strict=True):
        assert error(ours, right) < 1e-12
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(rms()(leaf, weight), leaf, dout)
    assert error(dx, truth[1]) < 1e-12


def test_slices_of_a_projection_are_read_where_they_lie(device):
    torch.manual_seed(0)
    whole = torch.randn(1, 50, 5 * 64, device=device)
    x = whole[..., 64:].unflatten(-1, (4, 64))
    assert not x.is_contiguous()
    torch.testing.assert_close(unit()(x), twin.unit_norm_torch(x))
    assert torch.equal(unit()(x), unit()(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 50, 3, 64), (2, 17, 1, 32), (1, 0, 2, 32), (3, 5, 2, 24)])
def test_the_rotation_equals_its_twin(shape, dtype, device):
    from mmmamba.ops.rotary.kernels import rotate

    torch.manual_seed(0)
    x, dout = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))
    angle = torch.rand(*shape[:2], 1, shape[-1] // 2, dtype=torch.float64, device=device) * 6
    cos, sin = angle.cos(), angle.sin()
    truth = run(lambda x: rotate_torch(x, cos, sin), [x.double()], dout)
    ours = run(lambda x: rotate(x, cos.to(dtype), sin.to(dtype)), [x], dout)
    for one, right in zip(ours, truth, strict=True):
        assert one.dtype == dtype
        assert x.numel() == 0 or error(one, right) < TOLERANCE[dtype]


def test_the_rotation_reads_slices_and_refuses_other_angles(device):
    from mmmamba.ops.rotary.kernels import rotate

    whole = torch.randn(2, 9, 3 * 32, device=device)
    x = whole[..., 32:].unflatten(-1, (2, 32))
    angle = torch.rand(2, 9, 1, 16, device=device)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), rotate_torch(x, angle.cos(), angle.sin()))
    with pytest.raises(ValueError, match="do not fit"):
        rotate(x, angle[:1].cos(), angle[:1].sin())


def test_operators_pass_pytorchs_own_check(device):
    rms(), unit()  # imported, they are registered
    from mmmamba.ops.rotary.kernels import rotate

    assert rotate is not None
    x = torch.randn(4, 3, 32, device=device, requires_grad=True)
    weight = torch.rand(32, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mmmamba.row_norm.default, (x, weight, 1e-5, False, torch.float32))
    torch.library.opcheck(torch.ops.mmmamba.row_norm.default, (x, None, 1e-12, True, torch.float32))
    angle = torch.rand(4, 1, 16, device=device)
    torch.library.opcheck(torch.ops.mmmamba.rotate.default, (x, angle.cos(), angle.sin(), False))
