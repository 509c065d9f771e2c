"""Where sequences begin and end in a batch, read from the arguments of transformers' callers.

A row may hold several sequences one after another ("packing", "padding-free"). Callers show this by ``position_ids``
that start again, by borders as flash attention takes them (``cu_seq_lens_q`` and ``cu_seq_lens_k``), or by the number
of each token's sequence (``seq_idx``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.errors import UserError
from mmmamba.hf.state_cache import StateCache

# max_length_q and max_length_k follow from the borders.
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class Packed:
    """A batch (b, l) whose rows hold several sequences: its real tokens as one packed row.

    Attributes:
        kept: (n,) places of the real tokens in the flattened batch.
        cu_seqlens: (s+1,) borders of the sequences among them.
    """

    def __init__(self, starts: Tensor, real: Tensor | None) -> None:
        self.shape = starts.shape
        starts = starts.clone()
        starts[:, 0] = True
        if real is None:
            self.kept = torch.arange(starts.numel(), device=starts.device)
        else:
            starts = _moved_to_real(starts, real)
            self.kept = real.flatten().nonzero()[:, 0]
        first = starts.flatten()[self.kept].nonzero()[:, 0]
        self.cu_seqlens = F.pad(first, (0, 1), value=len(self.kept)).to(torch.int32)
        order = torch.arange(starts.shape[1], device=starts.device)
        self._last = (order if real is None else torch.where(real, order, 0)).expand(self.shape).amax(1)

    def pack(self, x: Tensor) -> Tensor:
        """(b, l, …) → (1, n, …)."""
        return x.flatten(0, 1).index_select(0, self.kept)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, n, …) → (b, l, …), zeros at the padding."""
        out = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[2:])
        return out.index_copy(0, self.kept, x[0]).unflatten(0, self.shape)

    def last(self, x: Tensor) -> Tensor:
        """(b, l, d) → (b, 1, d) at each row's last real token."""
        return x[torch.arange(len(x), device=x.device), self._last][:, None]


def packed(
    shape: tuple[int, int], real: Tensor | None, past: StateCache, **given: Tensor | int | None
) -> Packed | None:
    """What ``position_ids`` and the arguments named in ``BORDERS`` say about a batch (b, l).

    None if each row is one sequence.

    Args:
        real: (b, l) bool, which tokens are not padding; None if all are real.

    Raises:
        UserError: they contradict each other, or give a token another position than its place in its sequence.
    """
    starts = _starts(shape, real, given)
    positions = given.get("position_ids")
    if positions is not None:
        found = _position_starts(_shaped("position_ids", positions, shape), real)
        if starts is not None and not torch.equal(found | starts, starts):
            raise UserError("position_ids start again where cu_seq_lens or seq_idx say that a sequence goes on")
        starts = found if starts is None else starts
    if starts is None or not bool(starts[:, 1:].any()):
        if positions is not None and past.state is not None:
            _check_goes_on(_shaped("position_ids", positions, shape), real, past)
        return None
    if past.state is not None:
        raise UserError("rows that hold several sequences can't continue from a cache (it holds one for each row)")
    return Packed(starts, real)


def _starts(shape: tuple[int, int], real: Tensor | None, given: dict[str, Tensor | int | None]) -> Tensor | None:
    """Where sequences begin, (b, l), from borders or numbers of sequences. None if neither is given."""
    q, k = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    starts: Tensor | None = None
    if q is not None or k is not None:
        q, k = (None if one is None else torch.as_tensor(one).flatten() for one in (q, k))
        if q is None or k is None or not torch.equal(q, k):
            raise UserError("cu_seq_lens_q and cu_seq_lens_k must be the same borders: a token reads its own sequence")
        total = shape[0] * shape[1]
        if len(q) < 2 or int(q[0]) != 0 or int(q[-1]) != total or bool((q.diff() < 0).any()):
            raise UserError(f"cu_seq_lens_q must rise from 0 to {total}, the tokens of the batch, got {q.tolist()[:8]}")
        if real is not None:
            raise UserError("give attention_mask or cu_seq_lens, not both")
        flat = torch.zeros(total + 1, dtype=torch.bool, device=q.device)
        flat[q.long()] = True
        starts = flat[:total].view(shape)
        if not bool(starts[:, 0].all()):
            raise UserError("cu_seq_lens_q must have a border at the end of each row")
    number = given.get("seq_idx")
    if number is not None:
        changed = F.pad(_shaped("seq_idx", number, shape).diff(dim=1) != 0, (1, 0))
        if starts is not None and not torch.equal(changed[:, 1:], starts[:, 1:]):
            raise UserError("seq_idx changes at other tokens than cu_seq_lens")
        starts = changed
    return starts


def _shaped(name: str, value: Tensor | int, shape: tuple[int, int]) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape not in (shape, (1, shape[1])):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name} is {got}, expected {shape}")
    return value.expand(shape)


def _position_starts(positions: Tensor, real: Tensor | None) -> Tensor:
    """Where positions (b, l) start again at 0. UserError if they do neither that nor rise by one."""
    on, again = positions.diff(dim=1) == 1, positions[:, 1:] == 0
    fine = on | again
    if real is not None:
        fine = fine | ~(real[:, 1:] & real[:, :-1])
        again = again & real[:, 1:] & real[:, :-1]
    if not bool(fine.all()):
        row, column = (int(i) for i in (~fine).nonzero()[0])
        raise UserError(
            f"position_ids[{row}] go from {int(positions[row, column])} to {int(positions[row, column + 1])}: they may "
            "rise by one, or start again at 0 with the next sequence"
        )
    return F.pad(again & ~on, (1, 0))


def _check_goes_on(positions: Tensor, real: Tensor | None, past: StateCache) -> None:
    """Refuse positions that do not continue where the cache ends, counted with or without padding."""
    assert past.state is not None
    first = (
        torch.zeros(len(positions), dtype=torch.long, device=positions.device) if real is None else real.int().argmax(1)
    )
    begins = positions.gather(1, first[:, None])[:, 0]
    seen = past.state.positions.to(begins.device)
    if not bool(((begins == seen) | (begins - first == past.columns)).all()):
        raise UserError(f"position_ids begin at {begins.tolist()[:4]}, the cache ends at {seen.tolist()[:4]}")


def _moved_to_real(starts: Tensor, real: Tensor) -> Tensor:
    """Move starts that are on padding to the next real token of their row."""
    sequence = starts.long().cumsum(1)
    before = torch.where(real, sequence, 0).cummax(1).values
    return real & F.pad(before.diff(dim=1) > 0, (1, 0), value=True)
