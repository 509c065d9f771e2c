"""What a sequence leaves behind: per layer a key/value cache or a conv + SSM state, as one value.

States are never changed in place: a pass takes one and returns another, so a state can be kept, branched and stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmmamba.device import to_host


@dataclass(frozen=True)
class KVState:
    """A softmax layer's cache for s sequences: rotated keys and values (s, L, g, p), which slots are filled (s, L)."""

    k: Tensor
    v: Tensor
    filled: Tensor

    def to(self, device: torch.device | str | int | None) -> KVState:
        return _map(self, lambda t: t.to(device))


@dataclass(frozen=True)
class MambaState:
    """A Mamba-2 layer's state: the last inputs of the convolution (s, k-1, c) and the SSM state (s, h, p, n)."""

    conv: Tensor
    ssm: Tensor

    def to(self, device: torch.device | str | int | None) -> MambaState:
        return _map(self, lambda t: t.to(device))


LayerState = KVState | MambaState
Kept = TypeVar("Kept", bound=LayerState)


def _map(layer: Kept, change: Callable[[Tensor], Tensor]) -> Kept:
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()}
    return replace(layer, **changed)


@dataclass(frozen=True)
class State:
    """The state of s sequences behind a whole model.

    Attributes:
        layers: one entry per global layer.
        positions: (s,) int64, tokens seen by each sequence; the next token's position.
        max_length: the length that dynamic RoPE scaling was fixed for when the state was made.
        embedded: (s,) int64, positions that the embedding stack has seen, where it reads patches in place of image
            tokens (``pixel_shuffle_loc: post``); None where it has seen what the decoder has.
        max_embedded: what ``max_length`` is for the decoder, for the positions of such an embedding stack (None: no
            other length).
    """

    layers: tuple[LayerState, ...]
    positions: Tensor
    max_length: int
    embedded: Tensor | None = None
    max_embedded: int | None = None

    @property
    def sequences(self) -> int:
        return self.positions.shape[0]

    @property
    def longest(self) -> int:
        """The most tokens (or patches) that any layer has seen of a sequence."""
        seen = self.positions if self.embedded is None else torch.maximum(self.positions, self.embedded)
        return int(seen.max())

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return sum(t.nbytes for t in self._tensors())

    def select(self, rows: Tensor) -> State:
        """The state of some of the sequences: ``rows`` are indices (or a boolean mask) over s."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def to(self, device: torch.device | str | int | None) -> State:
        """The state on a device; None is where it is, as for a tensor."""
        if device is None:
            return self
        if torch.device(device).type == "cpu" and self.positions.device.type != "cpu":
            found = iter(to_host(self._tensors()))
            return self._map(lambda _: next(found))
        return self._map(lambda t: t.to(device))

    def _tensors(self) -> list[Tensor]:
        """All tensors, in the order in which :meth:`_map` goes through them."""
        found = [getattr(layer, f.name) for layer in self.layers for f in fields(layer)]
        return [*found, self.positions] if self.embedded is None else [*found, self.positions, self.embedded]

    def _map(self, change: Callable[[Tensor], Tensor]) -> State:
        return replace(
            self,
            layers=tuple(_map(layer, change) for layer in self.layers),
            positions=change(self.positions),
            embedded=None if self.embedded is None else change(self.embedded),
        )
