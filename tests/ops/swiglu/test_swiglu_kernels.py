"""The SwiGLU kernels against the twin in float64, both ways."""

from __future__ import annotations

import pytest
import torch

from mmmamba.ops.swiglu import swiglu_torch

kernels = pytest.importorskip("mmmamba.ops.swiglu.kernels", exc_type=ImportError)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 2049), (0, 4), (1, 4096)])
@pytest.mark.parametrize("halves", [False, True])
def test_equals_the_twin_with_gradients(device, dtype, shape, halves):
    torch.manual_seed(0)
    if halves:  # of one tensor, as a joined product gives them
        whole = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)
        gate, up = (part.detach().requires_grad_() for part in whole.chunk(2, -1))
    else:
        gate, up = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    dout = torch.randn(shape, device=device).to(dtype)
    ours = kernels.swiglu(gate, up)
    gradients = torch.autograd.grad(ours, (gate, up), dout)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    truth = swiglu_torch(*wide)
    expected = torch.autograd.grad(truth, wide, dout.double())
    for one, other in zip((ours, *gradients), (truth, *expected), strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= LIMITS[dtype] * other.norm()


def test_extreme_gates_stay_finite(device):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device, requires_grad=True)
    up = torch.ones_like(gate, requires_grad=True)
    out = kernels.swiglu(gate, up)
    out.sum().backward()
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
    assert gate.grad.isfinite().all() and up.grad.isfinite().all()


def test_is_a_sound_custom_op(device):
    tensors = torch.randn(2, 5, device=device, requires_grad=True), torch.randn(2, 5, device=device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._forward.traced, tensors, test_utils=checks)


def test_refuses_what_does_not_fit(device):
    with pytest.raises(ValueError, match="differ"):
        kernels.swiglu(torch.ones(2, 3, device=device), torch.ones(2, 4, device=device))
