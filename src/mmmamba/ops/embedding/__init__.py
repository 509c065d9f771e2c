"""The start of a decoding step: the embeddings of its tokens, and how many tokens each sequence has read."""

from __future__ import annotations

from torch import Tensor

from mmmamba.ops.dispatch import serves
from mmmamba.ops.embedding.reference import embed_step_torch

__all__ = ["embed_step", "embed_step_torch"]


def embed_step(
    tokens: Tensor, slots: Tensor, weight: Tensor, counts: Tensor, *, special: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Embed one token of each row of a running batch, and count it in the row's slot.

    Args:
        tokens: (b,) int64 ids, below v, or v + m with ``special``.
        slots: (b,) int64, each row's place in the pool, no two the same; a negative one counts nothing.
        weight: (v, d) embeddings.  special: (m, d), of the ids from v on.
        counts: (c, pool) int64, one more in each row's slot afterwards.

    Returns:
        the embeddings (b, d), and the counts before this token (c, b), 0 for idle rows.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if tokens.ndim != 1 or tokens.shape != slots.shape:
        raise ValueError(f"embed_step: tokens {tuple(tokens.shape)}, slots {tuple(slots.shape)}, expected (b,) of both")
    if counts.ndim != 2 or (special is not None and special.shape[1] != weight.shape[1]):
        raise ValueError(
            f"embed_step: counts {tuple(counts.shape)}, expected (c, pool); weight {tuple(weight.shape)}, special "
            f"{None if special is None else tuple(special.shape)}, of one width"
        )
    if serves(tokens, slots, weight, counts, special):
        from mmmamba.ops.embedding.kernels import embed_step as kernel

        return kernel(tokens, slots, weight, counts, special=special)
    return embed_step_torch(tokens, slots, weight, counts, special=special)
