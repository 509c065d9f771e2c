"""Where sequences lie while they are decoded: the tensors of one layer, with a row for each slot."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.model.config import ModelConfig
from mmmamba.model.mixers import MAMBA2, LayerState
from mmmamba.model.mixers.kv_cache import KVState
from mmmamba.model.mixers.mamba2 import MambaState


class MambaSlots:
    """A Mamba-2 layer's part of a pool: conv (slots, k-1, c) and ssm (slots, h, p, n)."""

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens: a state of this kind has it."""

    def admit(self, slots: Tensor, state: LayerState) -> None:
        assert isinstance(state, MambaState)
        self.conv[slots] = state.conv.to(self.conv)
        self.ssm[slots] = state.ssm.to(self.ssm)

    def export(self, slots: Tensor, counts: Tensor) -> MambaState:
        """The states of some slots: copies. ``counts`` (slots,): the tokens seen of each."""
        wide = torch.promote_types(self.ssm.dtype, torch.float32)
        return MambaState(self.conv[slots], self.ssm[slots].to(wide))


class KVSlots:
    """A softmax layer's part of a pool: k and v (slots, room, g, p). The room grows with the longest sequence."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens, in new tensors; what the old ones hold is copied."""
        self.k, self.v = (self._longer(old, length) for old in (self.k, self.v))

    @staticmethod
    def _longer(old: Tensor, length: int) -> Tensor:
        slots, room, *heads = old.shape
        new = old.new_zeros(slots, length, *heads)
        new[:, :room] = old
        return new

    def admit(self, slots: Tensor, state: LayerState) -> None:
        assert isinstance(state, KVState)
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


def empty_slots(
    config: ModelConfig, layer: int, slots: int, *, dtype: torch.dtype, state_dtype: torch.dtype, device: torch.device
) -> MambaSlots | KVSlots:
    """A layer's part of a pool of ``slots`` slots, with no room in its caches yet.

    Args:
        dtype: of caches and convolutions.
        state_dtype: of SSM states.
    """
    stack = config.stack_of(layer)
    h, g, p = stack.num_heads, stack.num_kv_heads, stack.head_dim
    if config.layer_map[layer] == MAMBA2:
        conv = torch.zeros(slots, config.options(MAMBA2).conv_kernel - 1, (h + 2 * g) * p, dtype=dtype, device=device)
        return MambaSlots(conv, torch.zeros(slots, h, p, p, dtype=state_dtype, device=device))
    k, v = (torch.zeros(slots, 0, g, p, dtype=dtype, device=device) for _ in range(2))
    return KVSlots(k, v)
