"""Rotary position embedding of a stack, with the published scalings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.model.config import StackConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every token of a pass: (b, l, 1, p/2), shared by the layers of a stack."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (b, l, heads, p): the first half of each head is paired with the second."""
        return rotate(x, self.cos, self.sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (b, l, heads, p) by angles given as cosines and sines (b, l, 1, p/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_base(stack: StackConfig, max_length: int) -> float:
    """theta of a stack; under dynamic (NTK) scaling it depends on ``max_length``, the longest text that will follow."""
    scaling, limit, p = stack.rope_scaling, stack.max_position_embeddings, stack.head_dim
    if scaling is None or scaling.type != "dynamic" or max_length <= limit:
        return stack.rope_theta
    stretch = scaling.factor * max_length / limit - (scaling.factor - 1)
    return stack.rope_theta * stretch ** (p / (p - 2))


def rotation(stack: StackConfig, positions: Tensor, max_length: int, dtype: torch.dtype) -> Rotation:
    """The rotation of ``positions`` (b, l); angles in float32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, stack.head_dim, 2, device=positions.device, dtype=wide) / stack.head_dim
    inverse = rope_base(stack, max_length) ** -steps
    scaled = positions.to(wide)
    if stack.rope_scaling is not None and stack.rope_scaling.type == "linear":
        scaled = scaled / stack.rope_scaling.factor
    angles = (scaled[..., None] * inverse)[:, :, None]  # (b, l, 1, p/2)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
