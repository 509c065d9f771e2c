"""Rotations against transformers' own, for every scaling that both know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mmmamba.model import RopeScaling, StackConfig
from mmmamba.model.rope import rotation

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def make_stack(scaling: RopeScaling | None, theta: float = 5e5, head_dim: int = 32) -> StackConfig:
    return StackConfig(
        num_layers=1, intermediate_size=1, num_heads=2, num_kv_heads=2, head_dim=head_dim, rope_theta=theta,
        rope_scaling=scaling, max_position_embeddings=2048,
    )  # fmt: skip


def assert_same_rotation(stack: StackConfig, scaling: dict[str, Any], length: int) -> None:
    config = LlamaConfig(
        hidden_size=2 * stack.head_dim, num_attention_heads=2, head_dim=stack.head_dim, max_position_embeddings=2048,
        rope_parameters={"rope_theta": stack.rope_theta, **scaling},
    )  # fmt: skip
    x = torch.randn(1, length, 2, stack.head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    ours = rotation(stack, positions, length, torch.float32)(x)
    # Angles of hundreds of radians in float32, and the sum of the steps is rounded in another order here and there.
    assert torch.allclose(ours, theirs.transpose(1, 2), atol=3e-4, rtol=0)


@pytest.mark.parametrize("scaling, theirs, length", [
    (None, {"rope_type": "default"}, 700),
    (RopeScaling(type="linear", factor=3.0), {"rope_type": "linear", "factor": 3.0}, 700),
    (RopeScaling(type="dynamic", factor=2.0), {"rope_type": "dynamic", "factor": 2.0}, 3000),
    (RopeScaling(type="llama3", factor=8.0, **LLAMA3), {"rope_type": "llama3", "factor": 8.0, **LLAMA3}, 3000),
])  # fmt: skip
def test_every_scaling_is_that_of_transformers(scaling, theirs, length):
    assert_same_rotation(make_stack(scaling), theirs, length)


@settings(max_examples=30, deadline=None)
@given(
    theta=st.sampled_from([1e4, 1e5, 1e6]),
    head_dim=st.sampled_from([8, 16, 64]),
    factor=st.floats(1, 64),
    low=st.floats(0.25, 4),
    more=st.floats(0.25, 16),
    length=st.integers(1, 2048),
)
def test_llama3_with_any_numbers(theta, head_dim, factor, low, more, length):
    fields = {
        "low_freq_factor": low,
        "high_freq_factor": low + more,
        "original_max_position_embeddings": length,
        "factor": factor,
    }
    stack = make_stack(RopeScaling(type="llama3", **fields), theta, head_dim)
    assert_same_rotation(stack, {"rope_type": "llama3", **fields}, 60)


@pytest.mark.parametrize("fields, reason", [
    ({"type": "linear", "factor": 0.0}, "factor must be positive"),
    ({"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "linear scaling has a factor and nothing else"),
    ({"type": "llama3", "factor": 2.0}, "llama3 needs low_freq_factor"),
    ({"type": "llama3", "factor": 2.0, **LLAMA3, "high_freq_factor": 1.0}, "low_freq_factor .* < high_freq_factor"),
])  # fmt: skip
def test_scalings_that_make_no_sense(fields, reason):
    with pytest.raises(ValueError, match=reason):
        RopeScaling(**fields)
