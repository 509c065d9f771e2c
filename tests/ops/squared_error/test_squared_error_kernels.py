"""The squared error's kernels against the twin in float64, both ways."""

from __future__ import annotations

import pytest
import torch

from mmmamba.ops.squared_error import squared_error, squared_error_torch

kernels = pytest.importorskip("mmmamba.ops.squared_error.kernels", exc_type=ImportError)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def draw(tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    predicted, target = (torch.randn(tokens, channels, device=device).to(dtype) for _ in range(2))
    return [predicted.requires_grad_(), target, torch.rand(tokens, device=device)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(5, 7), (0, 4), (3, 2048), (1, 1)])
def test_equals_the_twin_with_gradients(device, dtype, shape):
    tensors = draw(*shape, dtype, device)
    ours = kernels.squared_error(*tensors)
    (gradient,) = torch.autograd.grad(ours * 3.0, tensors[:1])
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    truth = squared_error_torch(*wide)
    (expected,) = torch.autograd.grad(truth * 3.0, wide[:1])
    assert ours.dtype == torch.float32 and gradient.dtype == dtype
    assert (ours.double() - truth).abs() <= 1e-5 * truth
    assert (gradient.double() - expected).norm() <= LIMITS[dtype] * expected.norm()


def test_takes_what_is_not_contiguous(device):
    predicted, target, weight = draw(6, 8, torch.float32, device)
    apart = [predicted.detach().t().contiguous().t().requires_grad_(), target.t().contiguous().t(), weight]
    for one, other in zip(apart, (predicted, target, weight), strict=True):
        torch.testing.assert_close(one, other)
    ours, truth = kernels.squared_error(*apart), kernels.squared_error(predicted, target, weight)
    assert torch.equal(ours, truth)
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y, x in ((ours, apart[0]), (truth, predicted))))


def test_is_a_sound_custom_op(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._forward.traced, tuple(draw(3, 5, torch.float32, device)), test_utils=checks)


def test_refuses_what_does_not_fit():
    for shapes in (((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (3,)), ((2, 3, 1), (2, 3, 1), (2,))):
        with pytest.raises(ValueError, match=r"squared_error: predicted .* do not fit"):
            squared_error(*(torch.ones(shape) for shape in shapes))
