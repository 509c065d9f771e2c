"""The cache of a softmax layer: as a value; in tensors that grow in place while a long prompt is read; in a pool.

States are values, so a pass that goes on from one copies its caches. A prompt that is read in many pieces would copy
them with each. Whoever holds the only reference to a state may let its caches grow in place instead, and settle them
when all is read: :meth:`mmmamba.model.state.State.growing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba.model.mixers.layer_state import LayerState, Pool, PoolSpec
from mmmamba.model.rope import inverse_frequencies
from mmmamba.model.stack import StackConfig
from mmmamba.ops import attention_step


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
        """Write keys and values (s, l, g, p) after those there are; ValueError where there is no room."""
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


class KVPool(Pool[Any]):
    """The caches of a pool: k and v (slots, room, g, p). The room grows with the longest sequence."""

    def __init__(self, stack: StackConfig, spec: PoolSpec) -> None:
        shape = (spec.slots, 0, stack.num_kv_heads, stack.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(2))
        wide = torch.promote_types(spec.dtype, torch.float32)
        self.frequencies = inverse_frequencies(stack, spec.max_length, spec.device, wide)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens, in new tensors; what the old ones hold is copied."""
        self.k, self.v = (self._longer(old, length) for old in (self.k, self.v))

    @staticmethod
    def _longer(old: Tensor, length: int) -> Tensor:
        slots, room, *heads = old.shape
        new = old.new_zeros(slots, length, *heads)
        new[:, :room] = old
        return new

    def admit(self, slots: Tensor, state: KVState) -> None:
        # Rows that were padded, in any place, are closed up: what is filled comes first, in its order.
        order = state.filled.logical_not().byte().argsort(dim=1, stable=True)[..., None, None]
        width = min(state.k.shape[1], self.k.shape[1])
        for pool, kept in ((self.k, state.k), (self.v, state.v)):
            pool[slots, :width] = kept.gather(1, order.expand_as(kept))[:, :width].to(pool)

    def export(self, slots: Tensor, counts: Tensor) -> KVState:
        """The caches of some slots, as long as the longest of them: copies."""
        counts = counts[slots]
        width = int(counts.max()) if len(counts) else 0
        filled = torch.arange(width, device=self.k.device) < counts.to(self.k.device)[:, None]
        return KVState(self.k[slots, :width], self.v[slots, :width], filled)

    def heads(self, x: Tensor, slots: Tensor, at: Tensor, longest: int | None) -> dict[str, Any]:
        heads = attention_step(x, self.k, self.v, slots, at, self.frequencies, longest=longest, chained=True)
        return {"x": heads}
