"""How much memory is in use, and what to do when it is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mmmamba.device import is_full, release

__all__ = ["attempt", "is_full", "peak", "release", "reset_peak"]

T = TypeVar("T")


def attempt(call: Callable[[], T | None], device: torch.device) -> T | None:
    """Return what ``call`` returns, or None when it runs out of memory. In both cases its memory is released.

    Running out of memory is an answer here, not an accident: this is how the limit of a machine is found.
    """
    found = None
    try:
        found = call()
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
    # Not inside the handler: there the error still refers to the frames whose tensors filled the memory.
    release(device)
    return found


def reset_peak(device: torch.device) -> None:
    """Start counting for :func:`peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Most bytes that tensors held since :func:`reset_peak`; None where PyTorch does not count them (a CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
