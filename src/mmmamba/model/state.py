"""What a model keeps of some sequences: the state of each layer, of whatever kind, as one value.

States are never changed in place: a pass takes one and returns another, so a state can be kept, branched and stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba.device import to_host
from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import LayerState, StateBytes


@dataclass(frozen=True)
class State:
    """The state of s sequences in all layers of a model.

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
        return sum(t.nbytes for t in self.tensors())

    def select(self, rows: Tensor) -> State:
        """The state of some of the sequences: ``rows`` are indices (or a boolean mask) over s."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def to(self, device: torch.device | str | int | None) -> State:
        """The state on a device; None is where it is, as for a tensor."""
        if device is None:
            return self
        if torch.device(device).type == "cpu" and self.positions.device.type != "cpu":
            found = iter(to_host(self.tensors()))
            return self.map(lambda _: next(found))
        return self.map(lambda t: t.to(device))

    def growing(self, more: int) -> State:
        """The state with room for ``more`` tokens in every cache, which passes fill in place; see :meth:`settled`.

        For passes without gradients. A state whose sequences have gaps (padded rows) stays as it is; to know that, the
        host waits for the device once.
        """
        gapless = [flag for layer in self.layers if (flag := layer.gapless()) is not None]
        if more < 1 or not gapless or not bool(torch.stack(gapless).all()):
            return self
        return replace(self, layers=tuple(layer.growing(more) for layer in self.layers))

    def settled(self) -> State:
        """The state as a value again, which no pass changes."""
        return replace(self, layers=tuple(layer.settled() for layer in self.layers))

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which :meth:`map` goes through them."""
        found = [tensor for layer in self.layers for tensor in layer.tensors().values()]
        return [*found, self.positions] if self.embedded is None else [*found, self.positions, self.embedded]

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        return replace(
            self,
            layers=tuple(layer.map(change) for layer in self.layers),
            positions=change(self.positions),
            embedded=None if self.embedded is None else change(self.embedded),
        )


def state_bytes(config: ModelConfig, dtype: torch.dtype, wide: torch.dtype = torch.float32) -> StateBytes:
    """Bytes of one sequence's state in all layers of a model.

    Args:
        dtype: of what holds activations, such as keys and values.
        wide: of what sums over the whole sequence.
    """
    with torch.device("meta"):
        layers = [config.build_mixer(layer).state_bytes(dtype, wide) for layer in range(config.num_layers)]
    return StateBytes(
        recurrent=sum(layer.recurrent for layer in layers), per_token=sum(layer.per_token for layer in layers)
    )
