"""The beginning of a decoding step: the kernel against the twin, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmmamba.ops.embedding import embed_step_torch

kernels = pytest.importorskip("mmmamba.ops.embedding.kernels", exc_type=ImportError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(b=st.integers(0, 9), d=st.integers(1, 70), c=st.integers(1, 2), m=st.integers(0, 3), idle=st.integers(0, 3))
def test_equals_the_twin(device, dtype, b, d, c, m, idle):
    generator = torch.Generator().manual_seed(b * 71 + d)
    weight = torch.randn(20, d, generator=generator).to(device, dtype)
    special = torch.randn(m, d, generator=generator).to(device, dtype) if m else None
    tokens = torch.randint(0, 20 + m, (b,), generator=generator).to(device)
    slots = torch.randperm(12, generator=generator)[:b]
    slots[:idle] = -1
    slots = slots.to(device)
    counts = torch.randint(0, 1 << 40, (c, 12), generator=generator).to(device)
    kept = counts.clone()
    x, at = kernels.embed_step(tokens, slots, weight, counts, special=special)
    expected, before = embed_step_torch(tokens, slots, weight, kept, special=special)
    assert torch.equal(x, expected) and torch.equal(at, before) and torch.equal(counts, kept)


def test_is_a_sound_custom_op(device):
    tensors = (torch.randn(9, 5, device=device), None, torch.zeros(1, 4, dtype=torch.long, device=device))
    tokens, slots = torch.tensor([[3, 8], [2, 0]], device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels._embed_step.traced, (tokens, slots, *tensors), test_utils=checks)


def test_refuses_counts_that_are_not_contiguous(device):
    one = torch.zeros(1, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.embed_step(one, one, torch.ones(2, 2, device=device), one.new_zeros(4, 2).t())
