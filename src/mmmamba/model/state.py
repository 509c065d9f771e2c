"""What a sequence leaves behind: per layer a key/value cache or a conv + SSM state, as one value.

States are never changed in place: a pass takes one and returns another, so a state can be kept, branched and stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVState:
    """A softmax layer's cache for s sequences: rotated keys and values (s, L, g, p), which slots are filled (s, L)."""

    k: Tensor
    v: Tensor
    filled: Tensor


@dataclass(frozen=True)
class MambaState:
    """A Mamba-2 layer's state: the last inputs of the convolution (s, k-1, c) and the SSM state (s, h, p, n)."""

    conv: Tensor
    ssm: Tensor


LayerState = KVState | MambaState


def _map(layer: LayerState, change: Any) -> LayerState:
    return replace(layer, **{f.name: change(getattr(layer, f.name)) for f in fields(layer)})


@dataclass(frozen=True)
class State:
    """The state of s sequences behind a whole model.

    Attributes:
        layers: one entry per global layer.
        positions: (s,) int64, tokens seen by each sequence; the next token's position.
        max_length: the length that dynamic RoPE scaling was fixed for when the state was made.
    """

    layers: tuple[LayerState, ...]
    positions: Tensor
    max_length: int

    @property
    def sequences(self) -> int:
        return self.positions.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        tensors = [getattr(layer, f.name) for layer in self.layers for f in fields(layer)]
        return sum(t.numel() * t.element_size() for t in (*tensors, self.positions))

    def select(self, rows: Tensor) -> State:
        """The state of some of the sequences: ``rows`` are indices (or a boolean mask) over s."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        layers = tuple(_map(layer, lambda t: t.index_select(0, rows.to(t.device))) for layer in self.layers)
        return replace(self, layers=layers, positions=self.positions.index_select(0, rows.to(self.positions.device)))

    def to(self, device: torch.device | str) -> State:
        layers = tuple(_map(layer, lambda t: t.to(device)) for layer in self.layers)
        return replace(self, layers=layers, positions=self.positions.to(device))
