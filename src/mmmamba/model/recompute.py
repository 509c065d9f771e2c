"""What a backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
#: Which part of a layer: nothing; all that follows the heads (W_o, norm, MLP); the whole layer.
Recompute = Literal["none", "mlp", "layer"]


def recomputed(function: Callable[..., T], *inputs: Any, **options: Any) -> T:
    """A function's value. In the backward pass it is worked out once more, so that nothing of it is kept until then.

    Every operator gives the same bits again, so the gradients are the same to the bit (on a GPU as far as its kernels
    repeat themselves). Nothing here is random: no state of a generator has to be kept and read back from the device.
    """
    found: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return found
