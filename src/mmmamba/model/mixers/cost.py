"""What the cost of a mixer depends on, and sizes that mixers state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WIDE = 4  # bytes of a trained weight, its gradient, a moment of AdamW, and of what mixers keep in float32


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How passes run: bytes of a value in them, of a frozen weight (and of what flows between layers), and whether the
    operators are the GPU's kernels or PyTorch's.
    """

    width: int = 2
    frozen: int = WIDE
    kernels: bool = True

    @property
    def cast(self) -> int:
        """Bytes of a float32 weight's copy in the passes' format."""
        return self.width * (self.width != WIDE)

    @property
    def cast_frozen(self) -> int:
        """The same of a frozen weight."""
        return self.width * (self.width != self.frozen)


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of one sequence's state: ``recurrent`` at any length, ``per_token`` of cache for each token."""

    recurrent: int
    per_token: int

    def at(self, tokens: int) -> int:
        return self.recurrent + self.per_token * tokens


def bytes_saved(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a call for its backward pass, parameters left out, each storage counted once."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no later storage takes its number

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held too
    del result
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)
