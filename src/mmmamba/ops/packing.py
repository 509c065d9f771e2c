"""Where each token of a packed row belongs: the index tables that the packed operators share.

A packed row holds ``s`` sequences one after another; ``cu_seqlens`` (s+1,) holds their borders. The tables are computed
once for each ``cu_seqlens`` tensor (one copy to the host) and remembered while that tensor lives: the layers of a model
share them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_LAYOUTS = WeakTensorKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class ChunkTable:
    """Sequences cut into chunks, the chunks ordered so that the k-th chunks of all sequences lie together.

    Attributes:
        size: tokens a chunk, q.
        gather: (c, q) token of each chunk slot; slots past a sequence's end point at its last token.
        valid: (c, q) False for those slots.
        scatter: (total,) slot of each token in the flattened (c*q).
        counts: for k = 0, 1, …: how many sequences have a k-th chunk (non-increasing).
        order: (s,) the sequences by falling length, the order of the rows of every k.
    """

    size: int
    gather: Tensor
    valid: Tensor
    scatter: Tensor
    counts: list[int]
    order: Tensor


class Layout:
    """The tables of one packed row; build it through :func:`layout_of`."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self.total = sum(lengths)
        self.longest = max(lengths, default=0)
        self._chunks: dict[int, ChunkTable] = {}
        self._cuts: dict[int, Tensor] = {}
        self._begins: dict[tuple[int, int], Tensor] = {}

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def sizes(self) -> Tensor:
        """(s,) tokens of each sequence."""
        return torch.tensor(self.lengths, dtype=torch.long, device=self.device)

    @cached_property
    def starts(self) -> Tensor:
        """(s,) first token of each sequence."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def sequence(self) -> Tensor:
        """(total,) the sequence of each token."""
        rows = torch.arange(self.sequences)
        return torch.repeat_interleave(rows, torch.tensor(self.lengths, dtype=torch.long)).to(self.device)

    @cached_property
    def offset(self) -> Tensor:
        """(total,) how many tokens of the same sequence come before each token."""
        return torch.arange(self.total, device=self.device) - self.starts[self.sequence]

    @cached_property
    def last(self) -> Tensor:
        """(s,) the last token of each sequence."""
        return self.starts + self.sizes - 1

    @cached_property
    def padded_slot(self) -> Tensor:
        """(total,) slot of each token in a right-padded (s, longest) rectangle."""
        return self.sequence * self.longest + self.offset

    def pad(self, packed: Tensor) -> Tensor:
        """(total, …) → (s, longest, …), zeros after each sequence."""
        out = packed.new_zeros(self.sequences * self.longest, *packed.shape[1:])
        out = out.index_copy(0, self.padded_slot, packed)
        return out.view(self.sequences, self.longest, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(s, longest, …) → (total, …)."""
        return padded.flatten(0, 1).index_select(0, self.padded_slot)

    def chunks(self, size: int) -> ChunkTable:
        """The chunk table for chunks of ``size`` tokens."""
        if size not in self._chunks:
            self._chunks[size] = self._cut(size)
        return self._chunks[size]

    def cuts(self, size: int) -> Tensor:
        """(c, 4) int32, the chunks of ``size`` tokens, sequence by sequence; an empty sequence has one, without tokens.

        For each chunk: its sequence, and that sequence's first chunk, first token and length.
        """
        if size not in self._cuts:
            lengths = torch.tensor(self.lengths, dtype=torch.int32)
            chunks = ((lengths + size - 1) // size).clamp(min=1)
            ends, starts = chunks.cumsum(0), lengths.cumsum(0) - lengths
            table = torch.stack([torch.arange(self.sequences), ends - chunks, starts, lengths], dim=1)
            self._cuts[size] = table.repeat_interleave(chunks, 0).int().to(self.device, non_blocking=True)
        return self._cuts[size]

    def begins(self, size: int, segment: int) -> Tensor:
        """(w,) int32, the chunks at which segments begin: every ``segment``-th of each sequence (0: only the first).

        w is the most that such a row may have; the places that are left over hold -1.
        """
        if (size, segment) not in self._begins:
            cuts = self.cuts(size)
            chunk = torch.arange(len(cuts), device=self.device)
            index = chunk - cuts[:, 1]
            begins = (index == 0) if segment == 0 else (index % segment == 0)
            most = self.sequences + (len(cuts) // segment if segment else 0)
            # Each chunk that begins a segment goes to its place among them; all others to a place that is cut off.
            place = torch.where(begins, begins.cumsum(0) - 1, most).clamp(max=most)
            found = torch.full((most + 1,), -1, dtype=torch.int32, device=self.device)
            self._begins[size, segment] = found.scatter(0, place, chunk.int())[:most]
        return self._begins[size, segment]

    def _cut(self, size: int) -> ChunkTable:
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        starts = lengths.cumsum(0) - lengths
        order = torch.argsort(lengths, descending=True, stable=True)
        n_chunks = (lengths[order] + size - 1) // size
        depth = int(n_chunks[0]) if len(order) else 0
        counts = [int((n_chunks > k).sum()) for k in range(depth)]
        rows = torch.cat([torch.arange(n) for n in counts]) if counts else torch.zeros(0, dtype=torch.long)
        level = torch.repeat_interleave(torch.arange(depth), torch.tensor(counts, dtype=torch.long))
        within = level[:, None] * size + torch.arange(size)
        length_of = lengths[order][rows][:, None]
        valid = within < length_of
        gather = starts[order][rows][:, None] + torch.minimum(within, length_of - 1)
        scatter = torch.empty(self.total, dtype=torch.long)
        scatter[gather[valid]] = torch.arange(gather.numel()).view_as(gather)[valid]

        def move(t: Tensor) -> Tensor:
            return t.to(self.device, non_blocking=True)

        return ChunkTable(
            size=size, gather=move(gather), valid=move(valid), scatter=move(scatter), counts=counts, order=move(order)
        )


class DeviceLayout(Layout):
    """The layout of borders that the host does not know: the tensors of the row keep their shapes, the borders change.

    Every table is computed on the device. So a captured CUDA graph computes them again in each replay. ``lengths`` and
    ``chunks``, which the host would have to know, are refused.

    Args:
        cu_seqlens: (s+1,) borders on the device, the last one ``total``; sequences may be empty.
        total: tokens of the row.
        longest: no sequence is longer.
    """

    def __init__(self, cu_seqlens: Tensor, total: int, longest: int) -> None:
        self.borders, self.total, self.longest = cu_seqlens.long(), total, longest
        self.device = cu_seqlens.device
        self._chunks: dict[int, ChunkTable] = {}
        self._cuts: dict[int, Tensor] = {}
        self._begins: dict[tuple[int, int], Tensor] = {}

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """Refused (ValueError): an operator that asks for lengths cannot be part of a graph."""
        raise ValueError(
            "only the device knows this row's lengths: the operators need kernels for it (bfloat16 or float16 heads of "
            "32, 64 or 128 channels on a GPU); train without graph otherwise"
        )

    @property
    def sequences(self) -> int:
        return self.borders.shape[0] - 1

    @cached_property
    def sizes(self) -> Tensor:
        return self.borders.diff()

    @cached_property
    def sequence(self) -> Tensor:
        tokens = torch.arange(self.total, device=self.device)
        return torch.searchsorted(self.borders[1:].contiguous(), tokens, right=True)

    def cuts(self, size: int) -> Tensor:
        """As :meth:`Layout.cuts`, padded with empty sequences at the end to as many chunks as such a row may have.

        The empty ones have the last sequence's row in a state. So if states are given or asked for, it must be empty.
        """
        if size not in self._cuts:
            chunks = ((self.sizes + size - 1) // size).clamp(min=1)
            ends = chunks.cumsum(0)
            chunk = torch.arange(self.total // size + self.sequences, device=self.device)
            row = torch.searchsorted(ends, chunk, right=True)
            real, known = row < self.sequences, row.clamp(max=self.sequences - 1)
            table = [
                known,
                torch.where(real, (ends - chunks)[known], chunk),
                torch.where(real, self.starts[known], self.total),
                torch.where(real, self.sizes[known], 0),
            ]
            self._cuts[size] = torch.stack(table, dim=1).int()
        return self._cuts[size]


def layout_of(cu_seqlens: Tensor) -> Layout:
    """Give the layout of a packed row; it is remembered while the tensor ``cu_seqlens`` (s+1,) lives.

    Raises:
        ValueError: if the borders do not start at 0 or fall.
    """
    layout: Layout | None = _LAYOUTS.get(cu_seqlens)
    if layout is None:
        borders = cu_seqlens.tolist()
        lengths = [b - a for a, b in itertools.pairwise(borders)]
        if not borders or borders[0] != 0 or any(n < 0 for n in lengths):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {borders[:8]}…")
        layout = Layout(lengths, cu_seqlens.device)
        _LAYOUTS[cu_seqlens] = layout
    return layout


def layout_for(x: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Give the layout of ``x`` (b, l, …): a packed row if there are ``cu_seqlens``, else b sequences of l tokens.

    Raises:
        ValueError: if there are borders and more than one row, or if the borders do not end where the row ends.
    """
    if cu_seqlens is None:
        return uniform_layout(x.shape[0], x.shape[1], x.device)
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a packed row of batch 1, got batch {x.shape[0]}")
    layout = layout_of(cu_seqlens)
    if layout.total != x.shape[1]:
        raise ValueError(f"cu_seqlens ends at {layout.total}, the packed row has {x.shape[1]} tokens")
    return layout


def chunk_size(longest: int, channels: int) -> int:
    """Tokens of a chunk of a recurrence when PyTorch's own operators compute it: 16, 32 or 64.

    As many as a head has channels. In smaller chunks the products with the state take most of the time, in larger ones
    the products of each token with each (measured on a CPU). No more than the longest sequence fills.
    """
    return min(64, _power_of_two(channels), _power_of_two(longest))


def _power_of_two(least: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << max(least - 1, 0).bit_length())


def uniform_layout(rows: int, length: int, device: torch.device) -> Layout:
    """Give the layout of ``rows`` sequences of one length (a batch without padding, flattened)."""
    return Layout([length] * rows, device)


def remember_lengths(cu_seqlens: Tensor, lengths: list[int]) -> None:
    """Remember the layout of ``cu_seqlens`` from lengths that the host knows, so that it need not read the device."""
    _LAYOUTS[cu_seqlens] = Layout(lengths, cu_seqlens.device)


def remember_bounds(cu_seqlens: Tensor, total: int, longest: int) -> None:
    """From now on treat ``cu_seqlens`` as borders that only the device knows (:class:`DeviceLayout`)."""
    _LAYOUTS[cu_seqlens] = DeviceLayout(cu_seqlens, total, longest)
