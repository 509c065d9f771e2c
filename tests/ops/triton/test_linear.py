"""The one-row linear map against the twin in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmamba.ops.linear import linear_step, linear_step_torch

kernels = pytest.importorskip("mmmamba.ops.triton.linear", exc_type=ImportError)
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 1e-3}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    k=st.integers(1, 300),
    n=st.integers(20, 90),
    biased=st.booleans(),
    normed=st.booleans(),
    behind=st.sampled_from(["nothing", "residual", "swiglu"]),
    dtype=st.sampled_from(list(LIMITS)),
)
def test_equals_the_twin(device, k, n, biased, normed, behind, dtype):
    n += n % 2 if behind == "swiglu" else 0
    generator = torch.Generator().manual_seed(k * 97 + n)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight = draw(1, k), draw(n, k)
    options = {
        "bias": draw(n) if biased else None,
        "norm": draw(k) if normed else None,
        "residual": draw(1, n) if behind == "residual" else None,
    }
    ours = kernels.linear_step(x, weight, **options, eps=1e-5, swiglu=behind == "swiglu")
    wide = {name: None if t is None else t.double() for name, t in options.items()}
    truth = linear_step_torch(x.double(), weight.double(), **wide, eps=1e-5, swiglu=behind == "swiglu")
    assert ours.dtype == dtype
    assert (ours.double() - truth).norm() <= LIMITS[dtype] * truth.norm() + 1e-6


def test_is_a_sound_custom_op(device):
    tensors = torch.randn(1, 40, device=device), torch.randn(6, 40, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._linear, (*tensors, None, None, None, 1e-5, True), test_utils=checks)


def test_refuses_what_does_not_fit():
    x, weight = torch.randn(1, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="norm"):
        linear_step(x, weight, norm=torch.ones(3))
    with pytest.raises(ValueError, match="even"):
        linear_step(x, weight, swiglu=True)
    with pytest.raises(ValueError, match="one row"):
        kernels.linear_step(x.repeat(2, 1), weight)
