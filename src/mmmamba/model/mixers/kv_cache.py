"""The cache of a softmax layer: a value, and while a long prompt is read, tensors with room that grow in place.

States are values, so a pass that goes on from one copies its caches. A prompt that is read in many pieces would copy
them with each. Whoever holds the only reference to a state may let its caches grow in place instead, and settle them
when all is read: :meth:`mmmamba.model.state.State.growing`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.model.mixers.contract import LayerState


@dataclass(frozen=True)
class KVState(LayerState):
    """The cache of s sequences: rotated keys and values (s, L, g, p), and which slots are filled (s, L)."""

    k: Tensor
    v: Tensor
    filled: Tensor

    def gapless(self) -> Tensor:
        return self.filled.all()

    def trimmed(self, length: int) -> KVState:
        return self.map(lambda t: t[:, :length])

    def growing(self, more: int) -> GrowingKV:
        rows, length, *heads = self.k.shape
        k, v = (kept.new_empty(rows, length + more, *heads) for kept in (self.k, self.v))
        found = GrowingKV(k, v, 0)
        found.append(self.k, self.v)
        return found


@dataclass
class GrowingKV(LayerState):
    """The cache of s sequences without gaps, in tensors (s, room, g, p); the first ``length`` tokens are filled.

    A pass that goes on from it changes it, and gives the same object as its new state.
    """

    k: Tensor
    v: Tensor
    length: int

    def to(self, device: torch.device | str | int | None) -> GrowingKV:
        """The cache on a device: this very one where it lies there already, a copy elsewhere."""
        here = self.k.to(device)
        return self if here is self.k else GrowingKV(here, self.v.to(device), self.length)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write keys and values (s, l, g, p) behind those there are; ValueError where there is no room."""
        end = self.length + k.shape[1]
        if end > self.k.shape[1]:
            raise ValueError(f"{end} tokens do not fit into a cache with room for {self.k.shape[1]}")
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end

    def read(self, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (s, end - start, g, p) of some of the tokens, by default all: views."""
        part = slice(start, self.length if end is None else end)
        return self.k[:, part], self.v[:, part]

    def settled(self) -> KVState:
        k, v = self.read()
        return KVState(k, v, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device))
