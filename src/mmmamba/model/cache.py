"""The caches of softmax layers while a long prompt is read: room is made once, and every pass writes behind the last.

States are values, so a pass that goes on from one copies its caches. A prompt that is read in many pieces would copy
them with each. Whoever holds the only reference to a state may let its caches grow in place instead, and settle them
when all is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmmamba.model.state import KVState, State


@dataclass
class GrowingKV:
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


def growing(state: State, more: int) -> State:
    """The state with room for ``more`` tokens in every cache, which passes fill in place; see :func:`settled`.

    For passes without gradients. A state whose sequences have gaps (padded rows) stays as it is; to know that, the host
    waits for the device once.
    """
    caches = [layer for layer in state.layers if isinstance(layer, KVState)]
    if more < 1 or not caches or not bool(torch.stack([cache.filled.all() for cache in caches]).all()):
        return state
    layers: Any = tuple(_with_room(layer, more) if isinstance(layer, KVState) else layer for layer in state.layers)
    return replace(state, layers=layers)


def settled(state: State) -> State:
    """The state as a value again, which no pass changes."""
    layers: Any = tuple(_value(layer) if isinstance(layer, GrowingKV) else layer for layer in state.layers)
    return replace(state, layers=layers)


def _with_room(cache: KVState, more: int) -> GrowingKV:
    rows, length, *heads = cache.k.shape
    k, v = (kept.new_empty(rows, length + more, *heads) for kept in (cache.k, cache.v))
    found = GrowingKV(k, v, 0)
    found.append(cache.k, cache.v)
    return found


def _value(cache: GrowingKV) -> KVState:
    k, v = cache.read()
    return KVState(k, v, torch.ones(k.shape[:2], dtype=torch.bool, device=k.device))
