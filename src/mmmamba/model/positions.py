"""Where the new tokens of a pass are in their sequences, and how each stack of layers rotates them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba.errors import UserError
from mmmamba.model.config import ModelConfig
from mmmamba.model.rope import Rotation, rotation
from mmmamba.model.state import State
from mmmamba.ops import compute_dtype, layout_of
from mmmamba.ops.packing import DeviceLayout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """The places of the tokens that a pass adds.

    Attributes:
        embedding, decoder: the rotation of the layers of each stack.
        seen, max_length, embedded, max_embedded: what a :class:`~mmmamba.model.state.State` after the pass says of
            positions.
    """

    embedding: Rotation
    decoder: Rotation
    seen: Tensor
    max_length: int
    embedded: Tensor | None
    max_embedded: int | None


def places_of(
    config: ModelConfig,
    x: Tensor,
    cu_seqlens: Tensor | None,
    state: State | None,
    *,
    patches: tuple[Tensor, Tensor | None] | None = None,
    max_length: int | None = None,
    max_embedded: int | None = None,
) -> Places:
    """The places of the tokens x (b, l, d), packed with ``cu_seqlens`` or not, that go on from ``state``.

    Args:
        patches: the row, and its borders, that the embedding stack reads in place of x, where patches become tokens
            after it.
        max_length, max_embedded: for which lengths dynamic RoPE scaling is fixed where no state has fixed it.
    """
    dynamic, dtype = config.dynamic_rope, compute_dtype(x)
    positions, seen, longest = _count(x, cu_seqlens, None if state is None else state.positions, dynamic)
    fixed = state.max_length if state is not None else max(max_length or 0, longest)
    if dynamic:
        _warn_if_outgrown("text", longest, "tokens", fixed)
    decoder = rotation(config.decoder, positions, fixed, dtype)
    if patches is None:
        alike = config.embedding.rotates_like(config.decoder)
        embedding = decoder if alike else rotation(config.embedding, positions, fixed, dtype)
        return Places(embedding, decoder, seen, fixed, None, None)
    row, borders = patches
    # Each stack's base follows from the positions that this stack reads.
    places, embedded, widest = _count(row, borders, None if state is None else state.embedded, dynamic)
    if state is None:
        widest_fixed = max(max_embedded or widest + fixed - longest, widest)
    else:
        widest_fixed = fixed if state.max_embedded is None else state.max_embedded
    if dynamic:
        _warn_if_outgrown("row of patches", widest, "positions", widest_fixed)
    embedding = rotation(config.embedding, places, widest_fixed, dtype)
    return Places(embedding, decoder, seen, fixed, embedded, widest_fixed)


def _count(x: Tensor, cu_seqlens: Tensor | None, seen: Tensor | None, dynamic: bool) -> tuple[Tensor, Tensor, int]:
    """Positions (b, l) of the new tokens, how many each sequence has after them (s,), and the most of these.

    Only with dynamic scaling does the host ask the device for the lengths that a state has counted.
    """
    if cu_seqlens is None:
        rows, length = x.shape[:2]
        offset = torch.arange(length, device=x.device).expand(rows, length)
        past = torch.zeros(rows, dtype=torch.long, device=x.device) if seen is None else seen
        longest = length if seen is None or not dynamic else length + int(past.max())
        return offset + past[:, None], past + length, longest
    layout = layout_of(cu_seqlens)
    if layout.total != x.shape[1] or x.shape[0] != 1:
        raise ValueError(f"cu_seqlens ends at {layout.total}, the packed row is {tuple(x.shape[:2])}")
    if dynamic and isinstance(layout, DeviceLayout):
        raise UserError("dynamic RoPE scaling needs lengths that the host knows: train without graph")
    past = torch.zeros_like(layout.sizes) if seen is None else seen
    longest = layout.longest if seen is None or not dynamic else layout.longest + int(past.max())
    return (layout.offset + past[layout.sequence])[None], past + layout.sizes, longest


def _warn_if_outgrown(what: str, longest: int, unit: str, fixed: int) -> None:
    if longest > fixed:
        log.warning(
            "the %s grew to %d %s, past the %d that dynamic RoPE scaling was fixed for", what, longest, unit, fixed
        )
