"""Rotary position embedding of a stack, with the published scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.model.stack import RopeScaling, StackConfig
from mmmamba.ops import rotate


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every token of a pass: (b, l, 1, p/2), shared by the layers of a stack."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str | int | None) -> Rotation:
        return Rotation(self.cos.to(device), self.sin.to(device))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (b, l, heads, p): the first half of each head is paired with the second."""
        return rotate(x, self.cos, self.sin)


def rope_base(stack: StackConfig, max_length: int) -> float:
    """theta of a stack; under dynamic (NTK) scaling it depends on ``max_length``, the longest text that will follow."""
    scaling, limit, p = stack.rope_scaling, stack.max_position_embeddings, stack.head_dim
    if scaling is None or scaling.type != "dynamic" or max_length <= limit:
        return stack.rope_theta
    stretch = scaling.factor * max_length / limit - (scaling.factor - 1)
    return float(stack.rope_theta * stretch ** (p / (p - 2)))


def _inverse(stack: StackConfig, max_length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    steps = torch.arange(0, stack.head_dim, 2, device=device, dtype=dtype) / stack.head_dim
    # 1 / base^x, as everybody computes it: base^-x is rounded otherwise, which a logit shows as 1e-4 in float32.
    return _scaled_by_parts(1 / rope_base(stack, max_length) ** steps, stack.rope_scaling)


def inverse_frequencies(stack: StackConfig, max_length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The angle (p/2,) by which each pair of a head's channels turns from one position to the next."""
    inverse, scaling = _inverse(stack, max_length, device, dtype), stack.rope_scaling
    return inverse / scaling.factor if scaling is not None and scaling.type == "linear" else inverse


def rotation(stack: StackConfig, positions: Tensor, max_length: int, dtype: torch.dtype) -> Rotation:
    """The rotation of ``positions`` (b, l); angles in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = _inverse(stack, max_length, positions.device, wide)
    scaled = positions.to(wide)
    if stack.rope_scaling is not None and stack.rope_scaling.type == "linear":
        scaled = scaled / stack.rope_scaling.factor
    angles = (scaled[..., None] * inverse)[:, :, None]  # (b, l, 1, p/2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def _scaled_by_parts(inverse: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Angles a token (p/2,) under ``llama3`` scaling: slow ones divided by the factor, fast ones kept (Llama 3.1)."""
    if scaling is None or scaling.type != "llama3":
        return inverse
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None  # RopeScaling saw to it
    turns = length * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / scaling.factor)
